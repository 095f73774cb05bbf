package locker

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
)

// A FakeLockProvider creates locks in memory, for the unit tests of services. The locks use the
// same state machine as those of [PostgresLockProvider], and the provider gives all guarantees of
// the package that are not about PostgreSQL itself. It needs no server, and works in
// testing/synctest bubbles.
//
// Create it with [NewFakeProvider] or [NewLockProvider]. The zero value is ready to use, with the
// default of every option. All methods are safe for concurrent use. It must not be copied after
// first use.
type FakeLockProvider struct {
	once    sync.Once // completes conf and session, for the zero value
	conf    LockProviderConfig
	session *memorySession
}

// FakePreemptableLock is the lock that [FakeLockProvider.New] returns. The methods of its zero
// value return errors.
type FakePreemptableLock struct {
	lock
}

var (
	_ LockProvider    = (*FakeLockProvider)(nil)
	_ PreemptableLock = (*FakePreemptableLock)(nil)
)

func (flp *FakeLockProvider) init() {
	flp.once.Do(func() {
		// The zero value is valid, and any other configuration has been checked before.
		flp.conf, _ = flp.conf.checked()
		flp.session = newMemory().open(&flp.conf)
	})
}

// New creates a lock for key. Every int64 is a valid key. The event is the reason for the claim. It
// is shown to the holders and waiters that lose to the claim. New returns ctx's error if ctx is
// done, and [ErrProviderClosed] after Close.
func (flp *FakeLockProvider) New(ctx context.Context, key int64, event string) (PreemptableLock, error) {
	flp.init()
	l := &FakePreemptableLock{}
	if err := newLock(ctx, &l.lock, flp.session, &flp.conf, key, event); err != nil {
		return nil, err
	}
	return l, nil
}

// LockKey returns the key of a repo's pull request. It is not zero, is always the same for the same
// pair, and differs between pairs. LockKey returns an error if repo or pr is not valid, ctx's error
// if ctx is done, and [ErrProviderClosed] after Close.
func (flp *FakeLockProvider) LockKey(ctx context.Context, repo string, pr uint) (int64, error) {
	flp.init()
	if err := checkLockKey(ctx, flp.session.hub, repo, pr); err != nil {
		return 0, err
	}
	return flp.session.db.lockKey(repo, pr), nil
}

// Ping returns ctx's error if ctx is done, and [ErrProviderClosed] after Close.
func (flp *FakeLockProvider) Ping(ctx context.Context) error {
	flp.init()
	return annotate(checkUse(ctx, flp.session.hub), "locker: ping")
}

// Close notifies every holder with [ErrProviderClosed], and ends every wait with that error. It
// returns when all holds have ended, by release or by revocation after the preemption timeout.
// Every later use returns ErrProviderClosed. A further Close does no harm.
func (flp *FakeLockProvider) Close() error {
	flp.init()
	flp.session.hub.close()
	flp.session.close()
	return nil
}

// memory imitates the database: keys, claims, holders and sessions. Every decision that it makes is
// one that an SQL statement makes as well.
type memory struct {
	mu       sync.Mutex // guards everything below
	keys     map[pullRequest]int64
	taken    map[int64]bool // the keys in use
	rows     map[int64]*memoryRow
	sessions map[int64]memorySessionRow // the rows of env_lock_sessions, by ID
	live     map[int64]bool             // the sessions' advisory locks that are held
	listen   []*memorySession           // the sessions that receive notifications
	counter  int64                      // the source of claim numbers and tokens
}

// memoryRow is a row of env_lock_state.
type memoryRow struct {
	newest standing
	// The newest claim, as other claims see it.
	claim    ClaimInfo
	sequence *int64 // of the newest claim, or nil if it has none
	top      *int64 // the highest sequence number of all claims
	open     bool   // whether the newest claim's lock still waits or holds
	claimer  int64  // the newest claim's session
	token    int64
	streak   int // holds in a row that were ended by a newer claim

	// The hold. All are zero while the key is free.
	holder  uuid.UUID
	session int64
	hold    ClaimInfo
	stop    bool      // whether a claim has asked the holder to stop
	spared  time.Time // claims do not notify the holder before, or zero if it is not spared
}

// end ends the hold.
func (row *memoryRow) end() {
	if row.stop && !time.Now().Before(row.spared) {
		row.streak++
	} else {
		row.streak = 0
	}
	row.holder, row.session, row.hold, row.stop, row.spared = uuid.Nil, 0, ClaimInfo{}, false, time.Time{}
}

// memorySessionRow is a row of env_lock_sessions.
type memorySessionRow struct {
	lock    int64
	timeout time.Duration
}

func newMemory() *memory {
	return &memory{
		keys:     map[pullRequest]int64{},
		taken:    map[int64]bool{},
		rows:     map[int64]*memoryRow{},
		sessions: map[int64]memorySessionRow{},
		live:     map[int64]bool{},
	}
}

// lockKey returns the key of a pull request. It creates the key if there is none.
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

// rowLocked returns the row of a key. It creates the row if there is none.
func (m *memory) rowLocked(key int64) *memoryRow {
	row := m.rows[key]
	if row == nil {
		row = &memoryRow{}
		m.rows[key] = row
	}
	return row
}

// lockOfLocked returns the advisory lock that shows whether a session lives. Without a row it is a
// lock that no session has.
func (m *memory) lockOfLocked(id int64) int64 {
	if row, ok := m.sessions[id]; ok {
		return row.lock
	}
	return id
}

// notify passes an event to every session that listens.
func (m *memory) notify(key int64, ev event) {
	m.mu.Lock()
	var few [4]*memorySession
	listen := append(few[:0], m.listen...)
	m.mu.Unlock()
	for _, s := range listen {
		s.hub.dispatch(key, ev)
	}
}

// memorySession is a provider's session with the database in memory, and the backend of the
// provider's locks. It needs no heartbeats while it is connected. The tests suspend and restore it.
type memorySession struct {
	db      *memory
	conf    *LockProviderConfig
	hub     *hub
	trust   *trust
	watches watches

	mu       sync.Mutex    // guards everything below
	up       chan struct{} // closed while the session is connected
	releases []claim       // releases that wait for the connection
}

// open returns a new session, which is connected.
func (m *memory) open(conf *LockProviderConfig) *memorySession {
	s := &memorySession{db: m, conf: conf, hub: newHub(), up: make(chan struct{})}
	s.trust = newTrust(conf, s.hub)
	s.connect()
	return s
}

// connect connects the session with a new advisory lock. It must not be connected. It returns since
// when the session was suspended, or zero.
func (s *memorySession) connect() (suspended time.Time) {
	ref, _ := s.trust.current()
	ref.lock = randomKey()
	m := s.db
	m.mu.Lock()
	m.sessions[ref.id] = memorySessionRow{ref.lock, s.conf.sessionTimeout}
	m.live[ref.lock] = true
	m.listen = append(m.listen, s)
	m.mu.Unlock()
	suspended, _ = s.trust.connect(ref, time.Now())
	s.mu.Lock()
	close(s.up)
	s.mu.Unlock()
	return suspended
}

// suspend imitates the loss of all connections.
func (s *memorySession) suspend() {
	ref, connected := s.trust.current()
	if !connected {
		return
	}
	s.mu.Lock()
	s.up = make(chan struct{})
	s.mu.Unlock()
	m := s.db
	m.mu.Lock()
	delete(m.live, ref.lock)
	m.listen = slices.DeleteFunc(m.listen, func(other *memorySession) bool { return other == s })
	m.mu.Unlock()
	s.trust.beat(ref, time.Now())
	s.trust.suspend(ref, errors.New("connection closed"))
}

// restore imitates a reconnect. It compares rows and holds, and delivers the claims that were
// missed.
func (s *memorySession) restore() {
	suspended := s.connect()
	s.mu.Lock()
	releases := s.releases
	s.releases = nil
	s.mu.Unlock()
	for _, c := range releases {
		s.release(context.Background(), c)
	}

	lost := 0
	claims, _ := s.hub.held(new(int), math.MaxInt)
	ref, _ := s.trust.current()
	for _, c := range claims {
		s.db.mu.Lock()
		row := *s.db.rowLocked(c.key)
		s.db.mu.Unlock()
		switch {
		case row.holder != c.id || row.session != ref.id:
			lost++
			s.hub.dispatch(c.key, event{kind: evGone, hold: c.id, cause: errors.New("the row of the key does not name the hold any longer")})
		case row.stop:
			s.hub.dispatch(c.key, event{kind: evNewest, hold: c.id, from: row.newest, claim: row.claim.clone()})
		}
	}
	s.hub.broadcast(event{kind: evReleased})
	if !suspended.IsZero() {
		holds, _ := s.hub.counts()
		s.trust.reconnected(time.Since(suspended), holds, lost)
	}
}

// close ends the session, deletes its row and frees its advisory lock.
func (s *memorySession) close() {
	ref, _ := s.trust.current()
	s.trust.end()
	m := s.db
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.sessions, ref.id)
	delete(m.live, ref.lock)
	m.listen = slices.DeleteFunc(m.listen, func(other *memorySession) bool { return other == s })
}

// connected waits until the session is connected, and returns it. It returns stopped if ctx or stop
// ends before.
func (s *memorySession) connected(ctx context.Context, stop <-chan struct{}) (sessionRef, error) {
	for {
		if ref, ok := s.trust.current(); ok {
			return ref, nil
		}
		s.mu.Lock()
		up := s.up
		s.mu.Unlock()
		select {
		case <-up:
		case <-stop:
			return sessionRef{}, stopped{errSuspended}
		case <-ctx.Done():
			return sessionRef{}, stopped{errSuspended}
		}
	}
}

var errSuspended = errors.New("the session is suspended")

func (s *memorySession) events() *hub { return s.hub }

// newID returns an ID that is random enough for one process.
func (s *memorySession) newID() (id uuid.UUID) {
	binary.BigEndian.PutUint64(id[:8], rand.Uint64())
	binary.BigEndian.PutUint64(id[8:], rand.Uint64())
	// This is a UUID of version 4, like that of uuid.New.
	id[6], id[8] = id[6]&0x0f|0x40, id[8]&0x3f|0x80
	return id
}

func (s *memorySession) announce(ctx context.Context, stop <-chan struct{}, n announcement) (answer, error) {
	ref, err := s.connected(ctx, stop)
	if err != nil {
		return answer{}, err
	}
	c, sequence := n.claim, n.terms.sequence
	m := s.db
	m.mu.Lock()
	row := m.rowLocked(c.key)
	if late := time.Since(n.asked) > lateAfter; late && sequence == nil && row.newest.id != c.id && row.claim.Since.After(n.asked) {
		a := answer{outcome: superseded, newest: standing{id: c.id}, winner: row.claim.clone()}
		m.mu.Unlock()
		return a, nil
	}
	if sequence != nil && row.top != nil && (*sequence < *row.top ||
		*sequence == *row.top && row.newest.id != c.id && m.waitsLocked(row) && row.sequence != nil && *row.sequence == *sequence) {
		var since time.Time
		if row.sequence != nil && *row.sequence == *row.top {
			since = row.claim.Since
		}
		err := outdated(c.key, *sequence, *row.top, since, row.claim.clone())
		m.mu.Unlock()
		return answer{}, err
	}
	if sequence != nil {
		row.top = sequence
	}
	m.counter++
	row.newest, row.claim = standing{m.counter, c.id}, c.info(n.terms.labels, n.asked)
	row.sequence, row.open, row.claimer = sequence, true, ref.id
	a := answer{outcome: again, newest: row.newest}
	switch {
	case n.acquire && row.holder == uuid.Nil:
		m.grantLocked(row, c, n.terms.labels, ref, s.conf.progress, &a)
	case row.holder == c.id:
		// The holder's claim is the newest again.
		row.stop = false
	case row.holder != uuid.Nil && n.terms.mode == Preempt:
		row.stop = true
	}
	news := event{kind: evClaimed, from: a.newest, claim: row.claim.clone(), finish: n.terms.mode == LetFinish}
	m.mu.Unlock()
	m.notify(c.key, news)
	return a, nil
}

// info returns the claim, which has the labels, as other claims see it. It was made, or granted the key, at since.
func (c claim) info(labels string, since time.Time) ClaimInfo {
	return ClaimInfo{ID: c.id, Event: c.event, Labels: decodeLabels(labels), Host: hostName, PID: processID, Since: since}
}

// waitsLocked reports whether the newest claim of the row waits or holds.
func (m *memory) waitsLocked(row *memoryRow) bool {
	return row.open && m.live[m.lockOfLocked(row.claimer)]
}

// grantLocked writes into the row that the claim holds the key, and into a that it was granted.
func (m *memory) grantLocked(row *memoryRow, c claim, labels string, ref sessionRef, p progress, a *answer) {
	if row.holder != c.id {
		// The session of the old holder is dead.
		if row.holder != uuid.Nil {
			row.end()
		}
		m.counter++
		row.holder, row.token, row.hold = c.id, m.counter, c.info(labels, time.Now())
		row.hold.Token = row.token
		if p.n > 0 && row.streak >= p.n {
			row.spared = time.Now().Add(p.max)
		}
	}
	row.session = ref.id
	if row.newest.id == c.id {
		row.open, row.claimer = true, ref.id
	}
	a.grant(row.token, ref, !row.spared.IsZero())
}

func (s *memorySession) acquire(ctx context.Context, stop <-chan struct{}, r request) (answer, error) {
	ref, err := s.connected(ctx, stop)
	if err != nil {
		return answer{}, err
	}
	m := s.db
	m.mu.Lock()
	defer m.mu.Unlock()
	row := m.rowLocked(r.key)
	a := answer{newest: row.newest}
	lock := m.lockOfLocked(row.session)
	free := row.holder == uuid.Nil || row.holder == r.id || lock == r.blocker && s.watches.expired(lock) && !m.live[lock]
	switch {
	case !r.first && row.newest != r.standing && row.newest.number >= r.standing.number && row.newest.id != r.id:
		a.outcome = superseded
	case free && !(r.skip && row.holder != r.id && row.newest.id != r.id && m.waitsLocked(row)):
		m.grantLocked(row, r.claim, r.labels, ref, s.conf.progress, &a)
	default:
		a.outcome = busy
		if row.holder != uuid.Nil && !m.live[lock] {
			timeout := unknownTimeout(s.conf.sessionTimeout)
			for _, other := range m.sessions {
				timeout = max(timeout, other.timeout)
			}
			if holder, ok := m.sessions[row.session]; ok {
				timeout = holder.timeout
			}
			a.blocker, a.retryAt = lock, s.watches.dead(lock, timeout)
		}
	}
	return a, nil
}

func (s *memorySession) explain(ctx context.Context, stop <-chan struct{}, key int64) (k keyState, err error) {
	if _, err := s.connected(ctx, stop); err != nil {
		return k, err
	}
	m := s.db
	m.mu.Lock()
	defer m.mu.Unlock()
	row := m.rowLocked(key)
	if row.newest.id != uuid.Nil {
		k.newest, k.open = row.claim.clone(), m.waitsLocked(row)
	}
	if row.holder != uuid.Nil {
		k.holder, k.heldFor, k.alive = row.hold.clone(), time.Since(row.hold.Since), m.live[m.lockOfLocked(row.session)]
	}
	return k, nil
}

func (s *memorySession) release(_ context.Context, c claim) *op {
	if _, connected := s.trust.current(); !connected {
		s.mu.Lock()
		s.releases = append(s.releases, c)
		s.mu.Unlock()
		return nil
	}
	m := s.db
	m.mu.Lock()
	row := m.rowLocked(c.key)
	freed := row.holder == c.id
	if freed {
		row.end()
		row.open = row.open && row.newest.id != c.id
	}
	m.mu.Unlock()
	if freed {
		m.notify(c.key, event{kind: evReleased})
	}
	return nil
}

func (s *memorySession) withdraw(c claim) {
	m := s.db
	m.mu.Lock()
	defer m.mu.Unlock()
	// The claim of a holder is open until the release.
	if row := m.rowLocked(c.key); row.newest.id == c.id && row.holder != c.id {
		row.open = false
	}
}
