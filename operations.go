package locker

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"strings"
	"time"
)

// A LockStatus is the state of one key that is held or waited for, as the database knows it. In
// JSON the key is a string, because JavaScript and jq round numbers above 2^53. Tokens are below
// that.
type LockStatus struct {
	Key         int64  `json:",string"`
	Repo        string // "" if the key was not assigned by LockKey
	PullRequest uint

	// The hold. While the key is free, Since is zero, and the other fields except Token are empty.
	// Host, PID and Application are those of the holder's session. They are empty if the session
	// has no row.
	Event       string
	Host        string
	PID         int
	Application string
	Since       time.Time
	Token       int64 // of the hold or, while the key is free, of the last one
	// Alive reports whether the holder's session is connected. If it is not, the session is
	// suspended or its process has ended. Then the next Lock takes the key over after the session's
	// timeout, unless the session reconnects before.
	Alive  bool
	Labels map[string]string // of the holder's claim
	// StopAsked reports whether a claim has asked the holder to stop. If SparedUntil is not zero,
	// claims do not notify the holder before that time: see [WithProgress].
	StopAsked   bool
	SparedUntil time.Time `json:",omitzero"`
	// Streak is the number of holds in a row, before this one, that were ended by a newer claim.
	Streak int

	// The newest claim, which may be that of the holder.
	NewestEvent       string
	NewestHost        string
	NewestPID         int
	NewestApplication string
	NewestAt          time.Time
	NewestLabels      map[string]string
	// Waiting reports whether the newest claim waits for the key. Older claims are superseded, so
	// they do not wait for long.
	Waiting bool
}

// ListLocks returns all keys of the database that are held or waited for, by any process. These are
// the rows of the view env_lock_overview. If the server cannot be reached, it waits, within ctx and
// the lock timeout, and then returns an error that matches ctx's error or [ErrLockTimeout].
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

// RequestStop asks the holder of a repo's pull request to stop, in whichever process it runs, and
// reports whether a connected session held the lock. The holder is notified. The reason is the
// Message of its [NotificationPayload], and is in the text of the cause, which matches
// [ErrStopRequested]. The lock is revoked if it is still held when the preemption timeout has
// passed.
//
// RequestStop sends a message that no row keeps: a holder whose listener is not connected at that
// moment, or whose Lock has not returned yet, does not get it. It does not keep new claims out: one
// may follow immediately. If the server cannot be reached, or its NOTIFY queue is full, it waits,
// within ctx and the lock timeout, and then returns an error that matches ctx's error or
// [ErrLockTimeout].
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
		// This is because cleanEvent counts < as one byte.
		encoder.SetEscapeHTML(false)
		if err := encoder.Encode(message{LockKey: key, Event: storable(cleanEvent(reason), l.encoding)}); err != nil {
			return err
		}
		found = true
		return l.exec(ctx, sqlNotify, payload.String())
	})
	// The call may still be running, so its result must not be read.
	if err != nil {
		return false, err
	}
	return found, nil
}

// ResetSequence forgets the highest sequence number of a repo's pull request, and reports whether
// the pull request is known. The next claim is accepted whatever its number is, and its number is
// the highest from then on.
//
// Use it when claims fail with [ErrClaimOutdated] because a number was wrong: one from a wrong
// clock, or one in a smaller unit. The call itself notifies no holder and supersedes no waiter. The
// next claim does, whatever its number is. If the server cannot be reached, ResetSequence waits,
// within ctx and the lock timeout, and then returns an error that matches ctx's error or
// [ErrLockTimeout].
func (plp *PostgresLockProvider) ResetSequence(ctx context.Context, repo string, pr uint) (known bool, err error) {
	var found bool
	err = plp.operateOn(ctx, "reset the sequence of", repo, pr, func(ctx context.Context, l *link) error {
		var key int64
		return l.each(ctx, sqlResetSequence, []any{repo, int64(pr)}, []any{&key}, func() { found = true })
	})
	// The call may still be running, so its result must not be read.
	if err != nil {
		return false, err
	}
	return found, nil
}

// Ping checks that the provider works. It returns nil when the provider's session is connected, the
// server has accepted a write, and a notification from the connection of a statement has reached
// the listener. Otherwise its error names the step that has failed.
//
// Ping waits for a session that is suspended, for a listener that is not connected, and for a
// server that cannot be reached, is read-only or has a full NOTIFY queue, but no longer than ctx
// and the lock timeout. Give
// a probe a context with a short timeout. If the server rejects the statement for another reason,
// such as a locked or missing table, Ping returns that error immediately. A call of Ping counts as
// use: see [WithIdleTimeout].
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

// operateOn is operate for a pull request. Its error begins with doing, which describes the call.
func (plp *PostgresLockProvider) operateOn(ctx context.Context, doing, repo string, pr uint, call func(ctx context.Context, l *link) error) error {
	if plp.session == nil {
		return errProviderZero
	}
	if err := checkRepo(repo, pr); err != nil {
		return err
	}
	return annotate(plp.operate(ctx, call), "locker: %s %q#%d", doing, repo, pr)
}

// operate makes a worker of the provider call the given function, within ctx and the lock timeout.
func (plp *PostgresLockProvider) operate(ctx context.Context, call func(ctx context.Context, l *link) error) error {
	return plp.bounded(ctx, func(stop <-chan struct{}) error { return plp.session.call(ctx, stop, call) })
}

// bounded calls f with a channel that is closed after the lock timeout.
func (plp *PostgresLockProvider) bounded(ctx context.Context, f func(stop <-chan struct{}) error) error {
	if plp.session == nil {
		return errProviderZero
	}
	if err := checkUse(ctx, plp.session.hub); err != nil {
		return err
	}
	return within(ctx, plp.conf.lockTimeout, f)
}

// call makes a worker call f. It returns the server's errors, instead of repeating the operation.
func (s *session) call(ctx context.Context, stop <-chan struct{}, f func(ctx context.Context, l *link) error) error {
	o := newOp(ctx, opCall, claim{})
	o.call, o.once = f, true
	return s.do(stop, o).err
}

// Stats is the state of a provider at one moment.
type Stats struct {
	Queued  int // operations that wait for the database
	Held    int // keys that the provider's locks hold
	Waiting int // locks that wait for a key

	// Connected reports whether the session is connected. Suspended is the time since which it is
	// suspended. It is zero while the session is connected, before first use, after a loss, and
	// while the provider is idle: see [WithIdleTimeout].
	Connected bool
	Suspended time.Time
	// LastHeartbeat is when the last good heartbeat of the session began. It is zero before first
	// use, after a loss, and while the provider is idle.
	LastHeartbeat time.Time
	// Listening reports whether notifications arrive. Without them everything works, but later.
	Listening bool
}

// Stats returns the state of the provider, for metrics. It is cheap, and sends nothing to the
// server.
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
