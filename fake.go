package locker

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

// FakeLockProvider can serve as a lock provider with no external dependencies:
// the database in memory, under the same lock as the postgres provider. It is
// meant for the unit tests of services, works in testing/synctest bubbles and
// keeps every clause of the contract that is not marked as PostgreSQL's own.
// The zero value is ready to use, with every default. All methods may be called
// concurrently. It must not be copied after first use.
type FakeLockProvider struct {
	once  sync.Once // makes conf and store complete, for the zero value
	conf  LockProviderConfig
	store *memory
}

// FakePreemptableLock is the lock that FakeLockProvider.New answers. Its zero
// value answers errors.
type FakePreemptableLock struct {
	lock
}

var (
	_ LockProvider    = (*FakeLockProvider)(nil)
	_ PreemptableLock = (*FakePreemptableLock)(nil)
)

func (flp *FakeLockProvider) init() {
	flp.once.Do(func() {
		flp.conf, _ = flp.conf.checked() // the zero value is valid, anything else was checked before
		flp.store = newMemory()
	})
}

// New makes a lock for key; event says why it is wanted, to whomever it
// displaces. Any key is valid (C2). It answers ctx's error if ctx is done and
// ErrProviderClosed after Close.
func (flp *FakeLockProvider) New(ctx context.Context, key int64, event string) (PreemptableLock, error) {
	flp.init()
	l := &FakePreemptableLock{}
	if err := newLock(ctx, &l.lock, flp.store, &flp.conf, key, event); err != nil {
		return nil, err
	}
	return l, nil
}

// LockKey answers the key of a repo's pull request: non-zero, always the same
// for the same pair, different for different pairs (C1).
func (flp *FakeLockProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	flp.init()
	if err := checkLockKey(ctx, flp.store.hub, repo, pr); err != nil {
		return 0, err
	}
	return flp.store.lockKey(repo, pr), nil
}

// Close notifies every holder with ErrProviderClosed, ends every wait and
// answers once all of them are gone: released by their holders, or revoked
// after the preemption timeout (C22). Every later use is refused with
// ErrProviderClosed. Closing again is harmless.
func (flp *FakeLockProvider) Close() error {
	flp.init()
	flp.store.hub.close()
	return nil
}

// memory imitates the database: keys, claims, holders. It decides nothing that
// the SQL statements do not decide as well.
type memory struct {
	hub *hub

	mu      sync.Mutex // guards everything below
	keys    map[pullRequest]int64
	taken   map[int64]bool // the keys in use
	rows    map[int64]*memoryRow
	counter int64  // the source of claim numbers and tokens
	session uint64 // the generation of the imagined session, from 1
}

// memoryRow is a row of env_lock_state and the key's advisory lock in one.
type memoryRow struct {
	newest    standing
	event     string
	order     *int64 // of the newest claim, if it was given one
	top       *int64 // the highest order of all claims
	open      bool   // the newest claim's lock still waits or holds
	token     int64
	holder    uuid.UUID // as in the row: stays set when the session dies
	locked    bool      // the advisory lock: freed when the session dies
	uncleanAt time.Time // when a predecessor whose session had died was replaced
}

func newMemory() *memory {
	return &memory{
		hub:     newHub(),
		keys:    map[pullRequest]int64{},
		taken:   map[int64]bool{},
		rows:    map[int64]*memoryRow{},
		session: 1,
	}
}

func (m *memory) events() *hub { return m.hub }

// newID is random enough for one process.
func (m *memory) newID() (id uuid.UUID) {
	binary.BigEndian.PutUint64(id[:8], rand.Uint64())
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80 // version 4, as uuid.New's
	return id
}

func (m *memory) lockKey(repo string, pr uint) int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	id := pullRequest{repo, pr}
	key, ok := m.keys[id]
	for !ok {
		if key = rand.Int64(); key != 0 && !m.taken[key] {
			m.keys[id], m.taken[key], ok = key, true, true
		}
	}
	return key
}

func (m *memory) rowLocked(key int64) *memoryRow {
	row := m.rows[key]
	if row == nil {
		row = &memoryRow{}
		m.rows[key] = row
	}
	return row
}

func (m *memory) announce(_ context.Context, _ <-chan struct{}, n announcement) (answer, error) {
	c, order := n.claim, n.order
	m.mu.Lock()
	row := m.rowLocked(c.key)
	if order != nil && row.top != nil && (*order < *row.top ||
		*order == *row.top && row.newest.id != c.id && row.open && row.order != nil && *row.order == *order) {
		err := outdated(*order, *row.top, row.event)
		m.mu.Unlock()
		return answer{}, err
	}
	row.order, row.open = order, true
	if order != nil {
		row.top = order
	}
	m.counter++
	row.newest = standing{m.counter, c.id}
	row.event = c.event
	a := answer{outcome: again, newest: row.newest}
	if n.take && row.holder == uuid.Nil {
		m.grantLocked(row, c, &a)
	}
	m.mu.Unlock()
	m.hub.dispatch(c.key, event{kind: evClaimed, from: a.newest, message: c.event})
	return a, nil
}

func (m *memory) grantLocked(row *memoryRow, c claim, a *answer) {
	if row.holder != uuid.Nil {
		row.uncleanAt = time.Now()
	}
	m.counter++
	row.holder, row.locked, row.token = c.id, true, m.counter
	row.open = row.open || row.newest.id == c.id
	a.outcome, a.token, a.session = granted, row.token, m.session
	if !row.uncleanAt.IsZero() {
		a.drain = max(0, uncleanDelay-time.Since(row.uncleanAt))
	}
}

func (m *memory) acquire(_ context.Context, _ <-chan struct{}, r request) (answer, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	row := m.rowLocked(r.key)
	a := answer{newest: row.newest}
	switch {
	case !r.first && row.newest != r.standing && row.newest.number >= r.standing.number && row.newest.id != r.id:
		a.outcome, a.event = superseded, row.event
	case row.locked:
		a.outcome = busy
	default:
		m.grantLocked(row, r.claim, &a)
	}
	return a, nil
}

func (m *memory) release(_ context.Context, c claim) *op {
	m.mu.Lock()
	row := m.rowLocked(c.key)
	freed := row.holder == c.id && row.locked
	if freed {
		row.holder, row.locked = uuid.Nil, false
		row.open = row.open && row.newest.id != c.id
	}
	m.mu.Unlock()
	if freed {
		m.hub.dispatch(c.key, event{kind: evReleased})
	}
	return nil
}

func (m *memory) withdraw(c claim) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if row := m.rowLocked(c.key); row.newest.id == c.id {
		row.open = false
	}
}

// loseSession imitates the death of the session: every lock is free at once, the
// rows still name their holders. It is what the tests do to a fake holder.
func (m *memory) loseSession() {
	m.mu.Lock()
	lost := m.session
	m.session++
	for _, row := range m.rows {
		row.locked, row.open = false, false
	}
	m.mu.Unlock()
	m.hub.broadcast(event{kind: evLost, session: lost, cause: errors.New("connection closed")})
}
