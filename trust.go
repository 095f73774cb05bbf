package locker

import (
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/pkg/errors"
)

// trust is a provider's session as the provider's own locks see it: whether it is connected, and
// until when its holds can be relied on without a connection. Both providers use it.
//
//	connected ──suspend──▶ suspended ──connected──▶ connected (holds continue)
//	                           │
//	                           └── 0.9 T after the last good heartbeat: lost
//
// A session that is lost is abandoned: its holds end, and the next session has another ID.
type trust struct {
	conf *LockProviderConfig
	hub  *hub
	// Called after a session was lost, without mu. It may be nil.
	lost func()

	mu        sync.Mutex // guards everything below
	session   sessionRef
	connected bool
	good      time.Time // when the last good heartbeat began
	// When the session was suspended. It is zero while the session is connected, and before the
	// first connection.
	suspended time.Time
	expiry    *time.Timer // calls expire when good is too long ago
	armed     bool        // whether a call of expire counts
	ended     bool
}

// sessionRef names a session: its row, its present advisory lock, and its number among the sessions
// of its provider, from 1. A later session of the provider has a larger id.
type sessionRef struct {
	generation uint64
	id, lock   int64
}

func newTrust(conf *LockProviderConfig, h *hub) *trust {
	// In docs/operations.md the numbers from 1 << 62 on are those of sessions that do not exist.
	return &trust{conf: conf, hub: h, session: sessionRef{generation: 1, id: randomKey() / 2}}
}

// patience returns how long after the start of the last good heartbeat the holders of a session
// with the timeout t are notified. Successors wait for t, so a holder that runs is notified before
// its successor starts.
func patience(t time.Duration) time.Duration { return t * 9 / 10 }

// heartbeatInterval returns the time between two heartbeats of a session with the timeout t.
// heartbeatDeadline returns the time within which a heartbeat must succeed. With each heartbeat
// rows of holds are checked, so the interval does not grow with t beyond 3 s.
func heartbeatInterval(t time.Duration) time.Duration { return min(t*3/10, 3*time.Second) }
func heartbeatDeadline(t time.Duration) time.Duration { return min(t/5, 2*time.Second) }

// unknownTimeout returns how long a watcher with the session timeout t watches a session whose own
// timeout is not known, because the session has no row: an operator has taken the key away, or has
// deleted the row of the session or of the key. The watch is longer if another session has a longer
// timeout, which may be that of the holder. Meanwhile the check of its rows notifies the holder.
func unknownTimeout(t time.Duration) time.Duration { return max(t, defaultSessionTimeout) }

// lease returns for how long the server keeps a connection that is silent.
func lease(t time.Duration) time.Duration { return t * 3 / 2 }

// current returns the session, and reports whether it is connected.
func (t *trust) current() (s sessionRef, connected bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.session, t.connected
}

// connectedAs reports whether the session is s and connected.
func (t *trust) connectedAs(s sessionRef) bool {
	now, connected := t.current()
	return now == s && connected
}

// state returns whether the session is connected, since when it is suspended, and when its last
// good heartbeat began.
func (t *trust) state() (connected bool, suspended, good time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.connected, t.suspended, t.good
}

// connect starts or continues the session s with the advisory lock s.lock, by a heartbeat that
// began at start. It returns since when the session was suspended, which is zero for a new session.
// It returns false if s was lost meanwhile.
func (t *trust) connect(s sessionRef, start time.Time) (suspended time.Time, ok bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.ended || s.generation != t.session.generation {
		return time.Time{}, false
	}
	suspended = t.suspended
	t.session, t.connected, t.suspended, t.good, t.armed = s, true, time.Time{}, start, false
	return suspended, true
}

// beat records a good heartbeat that began at start, and arms the timer that ends the session if no
// other heartbeat follows in time. It reports whether the session is s and connected.
func (t *trust) beat(s sessionRef, start time.Time) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.session != s || !t.connected {
		return false
	}
	t.good = start
	t.armLocked()
	return true
}

// armLocked sets the timer to the moment at which the session is lost without another good
// heartbeat.
func (t *trust) armLocked() {
	t.armed = true
	left := time.Until(t.good.Add(patience(t.conf.sessionTimeout)))
	if t.expiry == nil {
		t.expiry = time.AfterFunc(left, t.expire)
	} else {
		t.expiry.Reset(left)
	}
}

// suspend records that the session has no connection any longer. Its holds continue. It does
// nothing unless the session is s and connected.
func (t *trust) suspend(s sessionRef, cause error) {
	t.mu.Lock()
	if t.session != s || !t.connected {
		t.mu.Unlock()
		return
	}
	t.connected, t.suspended = false, time.Now()
	t.armLocked()
	t.mu.Unlock()

	holds, _ := t.hub.counts()
	t.conf.logger.Warn("locker: session suspended", slog.Int("holds", holds), slog.String("cause", cause.Error()))
	t.observe(Observation{Kind: ObservedSuspended, Kept: holds, Err: cause})
}

// reconnected reports that a session continues. It has kept the holds that its rows still name, and
// has lost the others.
func (t *trust) reconnected(after time.Duration, kept, lost int) {
	t.conf.logger.Info("locker: session reconnected", slog.Duration("after", after), slog.Int("kept", kept), slog.Int("lost", lost))
	t.observe(Observation{Kind: ObservedReconnected, After: after, Kept: kept, Lost: lost})
}

// expire ends the session if the last good heartbeat began too long ago. The timer's goroutine
// calls it, and ends with it.
func (t *trust) expire() {
	t.mu.Lock()
	if t.ended || !t.armed {
		t.mu.Unlock()
		return
	}
	if left := time.Until(t.good.Add(patience(t.conf.sessionTimeout))); left > 0 {
		t.expiry.Reset(left)
		t.mu.Unlock()
		return
	}
	old := t.session
	t.nextLocked()
	t.mu.Unlock()

	// The holders first: a log that blocks must not keep them from stopping.
	holds, _ := t.hub.counts()
	cause := errors.Errorf("no heartbeat succeeded for %v", patience(t.conf.sessionTimeout))
	t.hub.broadcast(event{kind: evLost, session: old.generation, cause: cause})
	if t.lost != nil {
		t.lost()
	}
	t.conf.logger.Warn("locker: session lost", slog.Int("holds", holds), slog.String("cause", cause.Error()))
}

// rest ends the session s without a loss. It must have no holds.
func (t *trust) rest(s sessionRef) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.session == s {
		t.nextLocked()
	}
}

// nextLocked starts the next session.
func (t *trust) nextLocked() {
	t.session = sessionRef{generation: t.session.generation + 1, id: t.session.id + 1}
	t.connected, t.good, t.suspended, t.armed = false, time.Time{}, time.Time{}, false
}

// observe calls the observer, if there is one. It must be called without mu.
func (t *trust) observe(o Observation) {
	if f := t.conf.observer; f != nil {
		f(o)
	}
}

// end stops the timer. No other session follows.
func (t *trust) end() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ended, t.connected = true, false
	if t.expiry != nil {
		t.expiry.Stop()
	}
}

// watches records the advisory locks of sessions that this process has seen dead. The number of
// such a lock is never used again, so a lock that was seen dead once stays dead. Therefore a watch
// needs no polling, outlives the waiter that has started it, and is shared by all waiters and keys.
type watches struct {
	mu   sync.Mutex // guards ripe
	ripe map[int64]time.Time
}

// When there are more, all of them are forgotten.
const maxWatches = 10_000

// dead records that a lock is dead now. It returns when the session with that lock may be taken
// over: its timeout after the lock was first seen dead.
func (w *watches) dead(lock int64, timeout time.Duration) time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	if at, ok := w.ripe[lock]; ok {
		return at
	}
	if w.ripe == nil || len(w.ripe) >= maxWatches {
		// Sessions that are forgotten are watched again.
		w.ripe = map[int64]time.Time{}
	}
	at := time.Now().Add(timeout)
	w.ripe[lock] = at
	return at
}

// expired reports whether the session with a lock may be taken over, provided that the lock is still
// dead.
func (w *watches) expired(lock int64) bool {
	if lock == 0 {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	at, ok := w.ripe[lock]
	return ok && !time.Now().Before(at)
}

// randomKey returns a positive number that is almost certainly not in use.
func randomKey() int64 { return rand.Int64N(1<<63-1) + 1 }
