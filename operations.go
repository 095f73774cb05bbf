package locker

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// LockStatus is one key that is held or waited for, as the database knows it. In JSON the
// key is a string, because JavaScript and jq round numbers above 2^53. Tokens are below
// that.
type LockStatus struct {
	Key         int64  `json:",string"`
	Repo        string // "" if the key was not assigned by LockKey
	PullRequest uint

	// The hold. Since is zero while the key is free, and the other fields but Token are
	// then empty. Host, PID and Application are those of the holder's session, and empty
	// if that has no row any longer.
	Event       string
	Host        string
	PID         int
	Application string
	Since       time.Time
	Token       int64 // of the hold, or of the last one while the key is free
	// Alive reports whether the holder's session is connected. If not, the session is
	// suspended or its process has ended: then the next Lock takes over after the
	// session's timeout.
	Alive  bool
	Labels map[string]string // of the holder's claim
	// StopAsked reports whether a claim has asked the holder to stop. It is not notified
	// of claims before SparedUntil, if that is not zero: see [WithProgress].
	StopAsked   bool
	SparedUntil time.Time
	// Streak is how many holds in a row, before this one, were ended by a newer claim.
	Streak int

	// The newest claim, which may be the holder's own.
	NewestEvent       string
	NewestHost        string
	NewestPID         int
	NewestApplication string
	NewestAt          time.Time
	NewestLabels      map[string]string
	// Waiting reports whether the newest claim waits for the key. Older claims do not
	// wait for long: they are superseded.
	Waiting bool
}

// ListLocks returns the keys that are held or waited for in the whole database, by any
// process: what the view env_lock_overview shows. It waits no longer than ctx and the
// lock timeout.
func (plp *PostgresLockProvider) ListLocks(ctx context.Context) ([]LockStatus, error) {
	var result []LockStatus
	err := plp.operate(ctx, func(ctx context.Context, l *link) error {
		var all []LockStatus
		var h LockStatus
		var since, newest, spared sql.NullTime
		var labels, newestLabels string
		row := []any{&h.Key, &h.Repo, &h.PullRequest, &h.Event, &h.Host, &h.PID, &h.Application, &since, &h.Token, &h.Alive,
			&h.NewestEvent, &h.NewestHost, &h.NewestPID, &h.NewestApplication, &newest, &h.Waiting,
			&labels, &newestLabels, &h.StopAsked, &spared, &h.Streak}
		err := l.each(ctx, sqlListLocks, nil, row, func() {
			h.Since, h.NewestAt, h.SparedUntil = since.Time, newest.Time, spared.Time
			h.Labels, h.NewestLabels = decodeLabels(labels), decodeLabels(newestLabels)
			all = append(all, h)
		})
		result = all
		return err
	})
	if err != nil {
		return nil, annotate(err, "locker: list locks")
	}
	return result, nil
}

// RequestStop asks the holder of a repo's pull request to stop, whichever process it is
// in. The reason reaches it as NotificationPayload.Message and in the cause, which
// matches [ErrStopRequested]. Like every notification it is followed by revocation
// after the preemption timeout. RequestStop reports whether a connected session held the
// lock. A new claim may follow immediately: RequestStop keeps no claim out.
func (plp *PostgresLockProvider) RequestStop(ctx context.Context, repo string, pr uint, reason string) (asked bool, err error) {
	var found bool
	err = plp.operateOn(ctx, "stop the holder of", repo, pr, func(ctx context.Context, l *link) error {
		var key int64
		var held bool
		if err := l.each(ctx, sqlHolderOf, []any{repo, int64(pr)}, []any{&key}, func() { held = true }); err != nil || !held {
			return err
		}
		var payload strings.Builder
		encoder := json.NewEncoder(&payload)
		encoder.SetEscapeHTML(false) // cleanEvent counts < as one byte
		if err := encoder.Encode(message{LockKey: key, Event: storable(cleanEvent(reason), l.encoding)}); err != nil {
			return err
		}
		found = true
		return l.exec(ctx, sqlNotify, payload.String())
	})
	if err != nil { // the call may still be under way, so its result is not read
		return false, err
	}
	return found, nil
}

// ResetSequence forgets the highest sequence number of a repo's pull request. The next
// claim is accepted whatever its number is, and sets the highest anew. Use it when claims
// are turned away with [ErrClaimOutdated] for a number that was wrong: one from a clock
// that was wrong, or one in a smaller unit. It disturbs no holder and no waiter, but the
// next claim does, whatever its number. It reports whether the pull request is known.
func (plp *PostgresLockProvider) ResetSequence(ctx context.Context, repo string, pr uint) (known bool, err error) {
	var found bool
	err = plp.operateOn(ctx, "reset the sequence of", repo, pr, func(ctx context.Context, l *link) error {
		var key int64
		return l.each(ctx, sqlResetSequence, []any{repo, int64(pr)}, []any{&key}, func() { found = true })
	})
	if err != nil { // the call may still be under way, so its result is not read
		return false, err
	}
	return found, nil
}

// Ping proves that the provider works: its session is connected, the server accepts a
// write, and a notification travels from a statement's connection to the listener. It
// waits for a session that is suspended, for a listener that is on its way back, and for
// a server that cannot be reached or is read-only, but no longer than ctx and the lock
// timeout: give a probe a context with a short timeout. If the server rejects the
// statement for another reason, such as a locked or missing table, Ping returns that
// error immediately. The error says which step failed. A call of Ping counts as use, see
// [WithIdleTimeout].
func (plp *PostgresLockProvider) Ping(ctx context.Context) error {
	err := plp.bounded(ctx, func(stop <-chan struct{}) error {
		s := plp.session
		trouble := errors.New("the session is not connected")
		arrived, err := s.roundTrip(ctx, stop, func(payload string) error {
			ref, _ := s.trust.current()
			return s.call(ctx, stop, func(ctx context.Context, l *link) error {
				return l.each(ctx, sqlPing, []any{ref.id, ref.lock, payload}, []any{discard}, func() {
					trouble = errors.New("a notification was sent and has not arrived")
				})
			})
		})
		if err != nil || arrived {
			return err
		}
		return stopped{trouble}
	})
	return annotate(err, "locker: ping")
}

// operateOn is operate for a pull request: doing says what for, in its error.
func (plp *PostgresLockProvider) operateOn(ctx context.Context, doing, repo string, pr uint, call func(ctx context.Context, l *link) error) error {
	if plp.session == nil {
		return errProviderZero
	}
	if err := checkRepo(repo, pr); err != nil {
		return err
	}
	return annotate(plp.operate(ctx, call), "locker: %s %q#%d", doing, repo, pr)
}

// operate has an operator's call carried out by the provider's worker.
func (plp *PostgresLockProvider) operate(ctx context.Context, call func(ctx context.Context, l *link) error) error {
	return plp.bounded(ctx, func(stop <-chan struct{}) error { return plp.session.call(ctx, stop, call) })
}

// bounded calls f, which waits no longer than ctx and the lock timeout.
func (plp *PostgresLockProvider) bounded(ctx context.Context, f func(stop <-chan struct{}) error) error {
	if plp.session == nil {
		return errProviderZero
	}
	if err := checkUse(ctx, plp.session.hub); err != nil {
		return err
	}
	return within(ctx, plp.conf.lockTimeout, f)
}

// call has f carried out by a worker, for a caller that gets the server's errors.
func (s *session) call(ctx context.Context, stop <-chan struct{}, f func(ctx context.Context, l *link) error) error {
	o := newOp(ctx, opCall, claim{})
	o.call, o.once = f, true
	return s.do(stop, o).err
}

// Stats is a provider's state at one moment.
type Stats struct {
	Queued  int // operations that wait for the database
	Held    int // keys that the provider's locks hold
	Waiting int // locks that wait for a key

	// Connected reports whether the session is connected. Suspended is since when it is
	// not, although it was: zero while it is connected, before first use, once it is
	// lost, and while the provider is idle, see [WithIdleTimeout].
	Connected bool
	Suspended time.Time
	// LastHeartbeat is when the last heartbeat of the session began that succeeded: zero
	// before first use, once the session is lost, and while the provider is idle.
	LastHeartbeat time.Time
	// Listening reports whether notifications arrive. Without them everything works, but
	// later.
	Listening bool
}

// Stats returns the provider's state, for metrics. It asks no server and is cheap.
func (plp *PostgresLockProvider) Stats() Stats {
	if plp.session == nil {
		return Stats{}
	}
	s := plp.session
	var st Stats
	st.Held, st.Waiting = s.hub.counts()
	st.Connected, st.Suspended, st.LastHeartbeat = s.trust.state()
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Queued, st.Listening = s.queuedLocked(), s.listens
	return st
}
