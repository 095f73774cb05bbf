// Package broken has lock providers with one deliberate mistake each, to see
// that the oracle notices. They share a simple lock on one table that is polled;
// without a mistake, and without faults, it keeps the promises that are checked.
package broken

import (
	"context"
	"database/sql"
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
	None        = "none"         // the control
	NoFencing   = "no-fencing"   // tokens are counted by each process for itself
	TrustNotify = "trust-notify" // a waiter takes the key when a message says that it is free
	UnlockOther = "unlock-other" // Unlock, also after a wait that failed, frees whoever holds the key
)

// Mistakes are all of them.
var Mistakes = []string{NoFencing, TrustNotify, UnlockOther}

// Channel is where the providers announce releases.
const Channel = "broken_released"

const schema = `CREATE TABLE IF NOT EXISTS broken_locks (
	key bigint PRIMARY KEY, claim bigint NOT NULL DEFAULT 0, claimant text, holder text, token bigint NOT NULL DEFAULT 0)`

const poll = 100 * time.Millisecond

// Provider is a locker.LockProvider.
type Provider struct {
	mistake string
	timeout time.Duration
	db      *sql.DB
	heard   *pq.Listener
	tokens  atomic.Int64
	stop    chan struct{}
	running sync.WaitGroup

	mu      sync.Mutex // guards waiting
	waiting map[*lock]chan struct{}
}

// New makes a provider with one of the mistakes.
func New(mistake, uri string, lockTimeout time.Duration) (*Provider, error) {
	db, err := sql.Open("postgres", uri)
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(8)
	if _, err := db.Exec("SELECT pg_advisory_xact_lock(77); " + schema); err != nil {
		return nil, err
	}
	p := &Provider{mistake: mistake, timeout: lockTimeout, db: db, stop: make(chan struct{}), waiting: map[*lock]chan struct{}{}}
	p.heard = pq.NewListener(uri, poll, time.Second, nil)
	if err := p.heard.Listen(Channel); err != nil {
		return nil, err
	}
	p.running.Add(1)
	go p.listen()
	return p, nil
}

func (p *Provider) listen() {
	defer p.running.Done()
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

// LockKey is the number itself.
func (p *Provider) LockKey(_ context.Context, _ string, pr uint) (int64, error) {
	return int64(pr), nil
}

// New makes a lock.
func (p *Provider) New(_ context.Context, key int64, event string) (locker.PreemptableLock, error) {
	return &lock{p: p, key: key, id: uuid.New(), event: event, over: make(chan struct{})}, nil
}

// Close ends every hold.
func (p *Provider) Close() error {
	close(p.stop)
	_ = p.heard.Close()
	p.running.Wait()
	return p.db.Close()
}

type lock struct {
	p     *Provider
	key   int64
	id    uuid.UUID
	event string
	claim int64
	token int64
	once  sync.Once
	over  chan struct{}

	mu    sync.Mutex // guards cause
	cause error
}

func (l *lock) Token() int64 { return l.token }

func (l *lock) Cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.cause
}

func (l *lock) Notify(ctx context.Context) error {
	return l.p.db.QueryRowContext(ctx, `INSERT INTO broken_locks AS b (key, claim, claimant) VALUES ($1, 1, $2)
		ON CONFLICT (key) DO UPDATE SET claim = b.claim + 1, claimant = $2 RETURNING claim`, l.key, l.event).Scan(&l.claim)
}

func (l *lock) Lock(ctx context.Context) (<-chan locker.NotificationPayload, error) {
	if l.claim == 0 { // never announced: as old as the newest
		if _, err := l.p.db.ExecContext(ctx, `INSERT INTO broken_locks (key) VALUES ($1) ON CONFLICT DO NOTHING`, l.key); err != nil {
			return nil, err
		}
		if err := l.p.db.QueryRowContext(ctx, `SELECT claim FROM broken_locks WHERE key = $1`, l.key).Scan(&l.claim); err != nil {
			return nil, err
		}
	}
	free := make(chan struct{}, 1)
	l.p.mu.Lock()
	l.p.waiting[l] = free
	l.p.mu.Unlock()
	defer func() {
		l.p.mu.Lock()
		delete(l.p.waiting, l)
		l.p.mu.Unlock()
	}()
	deadline := time.After(l.p.timeout)
	condition := "holder IS NULL"
	for {
		err := l.p.db.QueryRowContext(ctx, `UPDATE broken_locks SET holder = $2, token = token + 1
			WHERE key = $1 AND claim = $3 AND `+condition+` RETURNING token`, l.key, l.id, l.claim).Scan(&l.token)
		if err == nil {
			return l.held(), nil
		}
		newest := l.claim
		if err := l.p.db.QueryRowContext(ctx, `SELECT claim FROM broken_locks WHERE key = $1`, l.key).Scan(&newest); err != nil {
			return nil, err
		}
		if newest > l.claim {
			l.failed()
			return nil, locker.ErrLockPreempted
		}
		select {
		case <-free:
			if l.p.mistake == TrustNotify {
				condition = "true"
			}
		case <-time.After(poll):
		case <-deadline:
			l.failed()
			return nil, locker.ErrLockTimeout
		case <-l.p.stop:
			l.failed()
			return nil, locker.ErrProviderClosed
		}
	}
}

func (l *lock) failed() {
	if l.p.mistake == UnlockOther {
		_ = l.Unlock(context.Background())
	}
}

func (l *lock) held() <-chan locker.NotificationPayload {
	if l.p.mistake == NoFencing {
		l.token = l.p.tokens.Add(1)
	}
	ch := make(chan locker.NotificationPayload, 1)
	l.p.running.Add(1)
	go func() { // ends with Unlock
		defer l.p.running.Done()
		tick := time.NewTicker(poll)
		defer tick.Stop()
		stop := l.p.stop
		notified := false
		tell := func(cause error) {
			if notified {
				return
			}
			notified = true
			l.mu.Lock()
			l.cause = cause
			l.mu.Unlock()
			ch <- locker.NotificationPayload{ID: l.id, Message: cause.Error(), LockKey: l.key}
		}
		for {
			select {
			case <-l.over:
				return
			case <-stop:
				tell(locker.ErrProviderClosed)
				stop = nil
			case <-tick.C:
				var newest int64
				if err := l.p.db.QueryRow(`SELECT claim FROM broken_locks WHERE key = $1`, l.key).Scan(&newest); err == nil && newest > l.claim {
					tell(locker.ErrLockPreempted)
				}
			}
		}
	}()
	return ch
}

func (l *lock) Unlock(ctx context.Context) error {
	mine := " AND holder = $2"
	if l.p.mistake == UnlockOther {
		mine = " AND $2 <> ''"
	}
	l.once.Do(func() { close(l.over) })
	_, err := l.p.db.ExecContext(ctx, `UPDATE broken_locks SET holder = NULL WHERE key = $1`+mine, l.key, l.id.String())
	if err == nil {
		_, err = l.p.db.ExecContext(ctx, `SELECT pg_notify($1, $2)`, Channel, fmt.Sprint(l.key))
	}
	return err
}
