// Package broken contains lock providers with one deliberate mistake each, to show that the oracle
// notices it. They share a simple lock on one table that is polled. Their sessions are leases: a
// counter that grows as long as the process is in contact. Without a mistake the provider keeps the
// promises that are checked, whatever happens to its connections.
package broken

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"

	"github.com/preemptable/locker"
)

// The mistakes.
const (
	None          = "none"            // none, as the control
	NoFencing     = "no-fencing"      // each process counts tokens separately
	TrustNotify   = "trust-notify"    // a waiter takes the key when a message reports that it is free
	UnlockOther   = "unlock-other"    // Unlock, even after a wait that failed, frees the key of any holder
	LoseOnCut     = "lose-on-cut"     // one failed heartbeat loses every hold
	HoldOn        = "hold-on"         // holders are not notified when contact is lost
	GiveUp        = "give-up"         // the first error ends a claim
	TakeSuspended = "take-suspended"  // the keys of a session are taken over when it has been out of contact for half of its timeout
	NeverTake     = "never-take"      // the keys of a dead session are never taken over
	StopForFinish = "stop-for-finish" // a holder is notified even of a claim that lets it finish
	NoBound       = "no-bound"        // no hold is spared
	SkipFree      = "skip-free"       // a claim that skips does so whether or not the key is busy
	PassWaiters   = "pass-waiters"    // a claim that skips waits for four seconds, and takes the key before the claims that wait for it
	ForgetRelease = "forget-release"  // releases soon after a failed heartbeat are lost with their connection, and are not repeated
)

// Mistakes contains all mistakes.
var Mistakes = []string{NoFencing, TrustNotify, UnlockOther, LoseOnCut, HoldOn, GiveUp, TakeSuspended, NeverTake, StopForFinish, NoBound, SkipFree, PassWaiters, ForgetRelease}

// Channel is the channel on which the providers announce releases.
const Channel = "broken_released"

const schema = `
CREATE TABLE IF NOT EXISTS broken_locks (
	key bigint PRIMARY KEY, claim bigint NOT NULL DEFAULT 0, claimant text, holder text, session text, token bigint NOT NULL DEFAULT 0,
	stop boolean NOT NULL DEFAULT false, spared timestamptz, streak integer NOT NULL DEFAULT 0, waiter text, waiter_session text);
CREATE TABLE IF NOT EXISTS broken_sessions (id text PRIMARY KEY, beats bigint NOT NULL, at timestamptz NOT NULL)`

// streak is the number of holds in a row that claims have ended, when the present one ends.
const streak = `CASE WHEN b.stop AND coalesce(b.spared <= clock_timestamp(), true) THEN b.streak + 1 ELSE 0 END`

const (
	poll    = 100 * time.Millisecond
	release = 4 * time.Second // Unlock continues in the background after this time
	lurk    = 4 * time.Second // of PassWaiters
)

// Options are the settings of a provider.
type Options struct {
	LockTimeout, SessionTimeout time.Duration
	Progress                    int // holds in a row that claims may end, or 0 for any number
	Spared                      time.Duration
}

// Provider is a locker.LockProvider.
type Provider struct {
	mistake string
	options Options
	timeout time.Duration // of a wait
	lease   time.Duration // the session timeout
	db      *sql.DB
	heard   *pq.Listener
	tokens  atomic.Int64
	ctx     context.Context // canceled by Close
	stop    context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex // guards everything below
	waiting map[*lock]chan struct{}
	held    map[*lock]bool
	closed  bool // whether all holds have ended
	session string
	good    time.Time // start of the session's last good heartbeat, or zero if there was none
	watched map[string]watch
	failed  time.Time // when the last heartbeat failed
}

// watch is what a provider knows about another session.
type watch struct {
	beats int64
	since time.Time // when the counter was first seen with this value
}

// New creates a provider with one of the mistakes.
func New(mistake, uri string, o Options) (*Provider, error) {
	db, err := sql.Open("postgres", uri)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(8)
	if _, err := db.Exec("SELECT pg_advisory_xact_lock(77); " + schema); err != nil {
		return nil, err
	}
	p := &Provider{mistake: mistake, options: o, timeout: o.LockTimeout, lease: o.SessionTimeout, db: db, session: uuid.NewString(),
		waiting: map[*lock]chan struct{}{}, held: map[*lock]bool{}, watched: map[string]watch{}}
	p.ctx, p.stop = context.WithCancel(context.Background())
	p.heard = pq.NewListener(uri, poll, time.Second, nil)
	p.running.Go(p.listen)
	p.running.Go(p.beat)
	p.running.Go(p.alarm)
	return p, nil
}

func (p *Provider) listen() {
	// Listen waits for the first connection.
	_ = p.heard.Listen(Channel)
	for n := range p.heard.Notify {
		if n == nil {
			continue
		}
		p.mu.Lock()
		for l, ch := range p.waiting {
			if fmt.Sprint(l.key) == n.Extra {
				select {
				case ch <- struct{}{}:
				default:
				}
			}
		}
		p.mu.Unlock()
	}
}

// every calls f until the provider is closed.
func (p *Provider) every(interval time.Duration, f func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		f()
		select {
		case <-p.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// interval is the time between two heartbeats.
func interval(lease time.Duration) time.Duration { return lease * 3 / 10 }

// beat keeps the session in contact.
func (p *Provider) beat() {
	p.every(interval(p.lease), func() {
		for p.ctx.Err() == nil {
			p.mu.Lock()
			session := p.session
			p.mu.Unlock()
			start := time.Now()
			_, err := p.db.ExecContext(p.ctx, `INSERT INTO broken_sessions AS s VALUES ($1, 1, clock_timestamp())
				ON CONFLICT (id) DO UPDATE SET beats = s.beats + 1, at = excluded.at`, session)
			p.mu.Lock()
			if err == nil && p.session == session {
				p.good = start
			}
			if err != nil {
				p.failed = time.Now()
			}
			if err != nil && p.mistake == LoseOnCut {
				p.loseLocked()
			}
			p.mu.Unlock()
			if err == nil {
				return
			}
			pause(p.ctx, poll)
		}
	})
}

// alarm ends the session when it has been out of contact for too long.
func (p *Provider) alarm() {
	p.every(poll/2, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if !p.good.IsZero() && time.Since(p.good) > p.lease*9/10 && p.mistake != HoldOn {
			p.loseLocked()
		}
	})
}

// loseLocked ends every hold and begins another session.
func (p *Provider) loseLocked() {
	for l := range p.held {
		l.notify(locker.ErrLockLost)
		close(l.ch)
		delete(p.held, l)
	}
	p.session, p.good = uuid.NewString(), time.Time{}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// LockKey returns the number itself.
func (p *Provider) LockKey(_ context.Context, _ string, pr uint) (int64, error) {
	return int64(pr), nil
}

// New returns a lock.
func (p *Provider) New(_ context.Context, key int64, event string) (locker.PreemptableLock, error) {
	return &lock{p: p, key: key, id: uuid.New(), event: event, ch: make(chan locker.NotificationPayload, 1)}, nil
}

// Close ends every hold.
func (p *Provider) Close() error {
	p.stop()
	p.mu.Lock()
	for l := range p.held {
		l.notify(locker.ErrProviderClosed)
	}
	p.mu.Unlock()
	for end := time.Now().Add(release); time.Now().Before(end) && p.holding(); {
		time.Sleep(poll / 10)
	}
	_ = p.heard.Close()
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.running.Wait()
	return p.db.Close()
}

func (p *Provider) holding() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.held) > 0
}

type lock struct {
	p     *Provider
	key   int64
	id    uuid.UUID
	event string
	claim int64
	token int64
	ch    chan locker.NotificationPayload

	spared time.Time // no claim notifies the holder before this time

	// The provider's mu guards the fields below.
	cause error
}

func (l *lock) Token() int64 { return l.token }

func (l *lock) Cause() error {
	l.p.mu.Lock()
	defer l.p.mu.Unlock()
	return l.cause
}

// notify has to be called with the provider's mu locked.
func (l *lock) notify(cause error) {
	if l.cause == nil {
		l.cause = cause
		l.ch <- locker.NotificationPayload{ID: l.id, Message: cause.Error(), LockKey: l.key}
	}
}

// persist repeats a statement until it has succeeded. If it does not, the error is the reason.
func (p *Provider) persist(ctx context.Context, statement func(context.Context) error) error {
	for {
		err := statement(ctx)
		if err == nil || p.mistake == GiveUp {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-p.ctx.Done():
			return locker.ErrProviderClosed
		case <-time.After(poll):
		}
	}
}

// Notify announces the claim. It may do so more than once. The last time counts.
func (l *lock) Notify(ctx context.Context) error {
	mode := locker.ModeFromContext(ctx)
	if mode == locker.SkipIfBusy {
		return nil
	}
	p := l.p
	return p.persist(ctx, func(ctx context.Context) error {
		p.mu.Lock()
		session := p.session
		p.mu.Unlock()
		return p.db.QueryRowContext(ctx, `INSERT INTO broken_locks AS b (key, claim, claimant, waiter, waiter_session) VALUES ($1, 1, $2, $3, $4)
			ON CONFLICT (key) DO UPDATE SET claim = b.claim + 1, claimant = $2, waiter = $3, waiter_session = $4,
				stop = b.stop OR $5 AND b.holder <> $3 AND b.holder IS NOT NULL RETURNING claim`,
			l.key, l.event, l.id.String(), session, mode == locker.Preempt || p.mistake == StopForFinish).Scan(&l.claim)
	})
}

func (l *lock) Lock(ctx context.Context) (<-chan locker.NotificationPayload, error) {
	p := l.p
	began, skip := time.Now(), locker.ModeFromContext(ctx) == locker.SkipIfBusy
	if skip && p.mistake == SkipFree {
		return nil, locker.ErrLockBusy
	}
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	free := make(chan struct{}, 1)
	p.mu.Lock()
	p.waiting[l] = free
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.waiting, l)
		p.mu.Unlock()
	}()
	for trusting := false; ; {
		pause := poll
		newest, holder, beats, err := l.look(ctx)
		switch {
		case err != nil && p.mistake == GiveUp:
			return nil, err
		case err != nil:
		case newest > l.claim && !skip:
			l.failed()
			return nil, locker.ErrLockPreempted
		default:
			got, err := l.take(ctx, p.dead(holder, beats), beats, trusting, skip)
			switch {
			case got:
				return l.ch, nil
			case err == errNoSession:
			case err != nil && p.mistake == GiveUp:
				return nil, err
			case err == nil && skip && p.mistake == PassWaiters && time.Since(began) < lurk:
				pause = poll / 100
			case err == nil && skip:
				l.failed()
				return nil, locker.ErrLockBusy
			}
		}
		select {
		case <-free:
			trusting = p.mistake == TrustNotify
		case <-time.After(pause):
		case <-ctx.Done():
			l.failed()
			return nil, locker.ErrLockTimeout
		case <-p.ctx.Done():
			l.failed()
			return nil, locker.ErrProviderClosed
		}
	}
}

// look reads the key's newest claim and its holder's session. A claim that was never announced
// counts as the newest.
func (l *lock) look(ctx context.Context) (newest int64, holder string, beats int64, err error) {
	err = l.p.db.QueryRowContext(ctx, `WITH made AS (INSERT INTO broken_locks (key) VALUES ($1) ON CONFLICT DO NOTHING RETURNING claim)
		SELECT claim, '', 0 FROM made UNION ALL
		SELECT b.claim, coalesce(b.session, ''), coalesce(s.beats, 0) FROM broken_locks b LEFT JOIN broken_sessions s ON s.id = b.session WHERE b.key = $1`,
		l.key).Scan(&newest, &holder, &beats)
	if err == nil && l.claim == 0 {
		l.claim = newest
	}
	return newest, holder, beats, err
}

// dead returns the session if it has been watched being dead for long enough, and otherwise "".
func (p *Provider) dead(session string, beats int64) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	w, known := p.watched[session]
	if !known || w.beats != beats {
		w = watch{beats, time.Now()}
		p.watched[session] = w
	}
	// The process may have lived until its next heartbeat was due.
	limit := p.lease + interval(p.lease)
	if p.mistake == TakeSuspended {
		limit = p.lease / 2
	}
	if session == "" || time.Since(w.since) < limit || p.mistake == NeverTake {
		return ""
	}
	return session
}

// take tries to take the key. A session that is out of contact takes nothing. A claim that skips
// takes no key that another one waits for.
func (l *lock) take(ctx context.Context, dead string, beats int64, trusting, skip bool) (bool, error) {
	p := l.p
	p.mu.Lock()
	session, trusted := p.session, !p.good.IsZero()
	p.mu.Unlock()
	if !trusted {
		return false, errNoSession
	}
	progress := sql.NullInt64{Int64: int64(p.options.Progress), Valid: p.options.Progress > 0 && p.mistake != NoBound}
	const next = `CASE WHEN b.holder IS NULL OR b.holder = $2 THEN b.streak ELSE ` + streak + ` END`
	var spared bool
	err := p.db.QueryRowContext(ctx, `UPDATE broken_locks b SET holder = $2, session = $4, token = b.token + 1,
			stop = b.stop AND b.holder = $2, streak = `+next+`,
			spared = CASE WHEN b.holder = $2 THEN b.spared WHEN `+next+` >= $8 THEN clock_timestamp() + $9::float8 * interval '1 second' END
		WHERE b.key = $1 AND (b.claim = $3 OR $10) AND (b.holder IS NULL OR b.holder = $2 OR $7
			OR b.session = $5 AND (SELECT beats FROM broken_sessions WHERE id = $5) = $6)
			AND ($11 OR NOT $10 OR b.holder = $2 OR b.waiter IS NULL OR NOT EXISTS (
				SELECT FROM broken_sessions s WHERE s.id = b.waiter_session AND s.at > clock_timestamp() - $12::float8 * interval '1 second'))
		RETURNING token, spared IS NOT NULL`,
		l.key, l.id.String(), l.claim, session, dead, beats, trusting, progress, p.options.Spared.Seconds(), skip, p.mistake == PassWaiters, p.lease.Seconds()).
		Scan(&l.token, &spared)
	if err == sql.ErrNoRows {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if p.mistake == NoFencing {
		l.token = p.tokens.Add(1)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	// The session was lost meanwhile. The next try finds the key held by this claim.
	if p.session != session {
		return false, nil
	}
	p.held[l] = true
	if spared {
		l.spared = time.Now().Add(p.options.Spared)
	}
	// Close has notified the other holders already.
	if p.ctx.Err() != nil {
		l.notify(locker.ErrProviderClosed)
	}
	p.running.Go(l.watch)
	return true, nil
}

// errNoSession is returned by an attempt without a session.
var errNoSession = errors.New("out of contact")

// failed releases the key, in case a response with a grant was lost, and withdraws the claim.
func (l *lock) failed() {
	p := l.p
	if p.mistake == UnlockOther {
		_ = l.Unlock(context.Background())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.closed {
		p.running.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), p.lease+release)
			defer cancel()
			l.free(ctx, " AND $2 IN (holder, waiter)")
		})
	}
}

// free repeats the release of the key until the server has executed it.
func (l *lock) free(ctx context.Context, mine string) bool {
	p := l.p
	const ends = `($3 OR coalesce(b.holder = $2, false))`
	for ctx.Err() == nil {
		_, err := p.db.ExecContext(ctx, `UPDATE broken_locks b SET
				holder = CASE WHEN `+ends+` THEN NULL ELSE b.holder END, session = CASE WHEN `+ends+` THEN NULL ELSE b.session END,
				stop = b.stop AND NOT `+ends+`, spared = CASE WHEN `+ends+` THEN NULL ELSE b.spared END,
				streak = CASE WHEN `+ends+` THEN `+streak+` ELSE b.streak END, waiter = nullif(b.waiter, $2)
			WHERE b.key = $1`+mine, l.key, l.id.String(), p.mistake == UnlockOther)
		if err == nil || p.ctx.Err() != nil {
			return true
		}
		pause(p.ctx, poll)
	}
	return false
}

// watch notifies the holder of a newer claim. It returns when the hold has ended.
func (l *lock) watch() {
	p := l.p
	for p.ctx.Err() == nil {
		var stop bool
		err := p.db.QueryRowContext(p.ctx, `SELECT stop AND holder = $2 FROM broken_locks WHERE key = $1`, l.key, l.id.String()).Scan(&stop)
		p.mu.Lock()
		held := p.held[l]
		if held && err == nil && stop && !time.Now().Before(l.spared) {
			l.notify(locker.ErrLockPreempted)
		}
		p.mu.Unlock()
		if !held {
			return
		}
		pause(p.ctx, poll)
	}
}

// Unlock returns nil when the key is free, or when it will be as soon as the server can be reached.
func (l *lock) Unlock(context.Context) error {
	p := l.p
	mine := " AND holder = $2"
	if p.mistake == UnlockOther {
		mine = " AND $2 <> ''"
	}
	done := make(chan struct{})
	p.mu.Lock()
	// All holds have ended.
	if p.closed {
		p.mu.Unlock()
		return locker.ErrLockLost
	}
	lost := l.cause == locker.ErrLockLost
	forgotten := p.mistake == ForgetRelease && time.Since(p.failed) < p.lease/2
	// The goroutine starts before Close can see that there is no hold any longer.
	p.running.Go(func() {
		defer close(done)
		// This is not the provider's context, because Close releases the holds, too.
		ctx, cancel := context.WithTimeout(context.Background(), p.lease+release)
		defer cancel()
		if !forgotten && l.free(ctx, mine) {
			_, _ = p.db.ExecContext(ctx, `SELECT pg_notify($1, $2)`, Channel, fmt.Sprint(l.key))
		}
	})
	delete(p.held, l)
	p.mu.Unlock()
	select {
	case <-done:
	case <-time.After(release):
	}
	if lost {
		return locker.ErrLockLost
	}
	return nil
}
