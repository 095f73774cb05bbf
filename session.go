package locker

import (
	"context"
	"database/sql"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/pkg/errors"
)

const (
	maxBatch = 512             // operations in one statement
	patience = 5 * time.Second // longest that an operation waits for a session to be opened

	reopenMin = 50 * time.Millisecond // backoff between two attempts to open a session
	reopenMax = time.Second

	checkTimeout  = 3 * time.Second // for a NOTIFY to ourselves to arrive
	stallTimeout  = 4 * time.Second // for a statement to end, above the server's own timeouts
	cancelTimeout = 3 * time.Second // for a statement to be cancelled
	stuckPause    = 3 * time.Second // before a key whose row was locked by somebody else is tried again
)

// session is a provider's connection to its database: a lane or two, which hold
// the advisory locks, and one listener. It is the backend of every lock of the
// provider.
//
// The first lane and the listener start with the first operation and end with
// close; a link that is lost is replaced when there is work again. The second lane
// comes and goes, see duty. The session is lost as a whole: if one link is lost, so
// is the other.
type session struct {
	dsn         string
	serviceName string
	log         *slog.Logger
	hub         *hub

	mu         sync.Mutex // guards everything below, and what the lanes say it guards; never held across I/O
	lanes      [2]*lane
	generation uint64         // of the last link of the first lane; 0 before
	trouble    error          // why the last attempt to open it failed; nil after one that succeeded
	held       map[int64]hold // what the lanes hold, by key
	moving     int            // holds that are on their way from the first lane to the second
	duty       duty
	second     chan struct{}      // closed when the second lane's worker has ended; nil while there is none
	abort      context.CancelFunc // ends the opening of the second lane
	widenAfter time.Time          // not before, because it failed
	started    bool
	closing    bool
	done       chan struct{} // closed when the first lane's worker has ended
	brief      chan struct{} // capacity 1: who has a connection beside these, for a moment (C23)

	ctx  context.Context // ends with close; what is opened depends on it, not what is sent
	stop context.CancelFunc

	// The first lane's worker's own.
	listener *listener
	proven   bool // a NOTIFY has arrived
}

// hold is a key that a lane holds.
type hold struct {
	id     uuid.UUID // of the holder's claim
	beat   uint32    // the lane's heartbeats before it
	lane   uint8
	shared bool // in share mode; see park
	moving bool // to the second lane; it is released afterwards
}

// op is one operation of a caller. The caller waits on its channel; the worker
// answers exactly once.
type op struct {
	kind   opKind
	state  opState         // guarded by session.mu
	take   bool            // announce: see announcement
	ctx    context.Context // the caller's, for its span
	pull   *pullRequest    // lookup; announce: see announcement
	order  *int64          // announce: see announcement
	req    request         // acquire: all of it; announce, withdraw and release: the claim
	queued time.Time
	tries  bool          // the worker's: announce: this time it is to take the key
	result               // the worker's, until done
	done   chan struct{} // capacity 1
}

type result struct {
	answered bool   // a row was about it
	key      int64  // lookup
	answer   answer // announce and acquire
	err      error
}

var ops = sync.Pool{New: func() any { return &op{done: make(chan struct{}, 1)} }}

func newOp(ctx context.Context, kind opKind, c claim) *op {
	o := ops.Get().(*op)
	o.ctx, o.kind, o.req.claim = ctx, kind, c
	return o
}

// recycle answers the operation's result; afterwards it is somebody else's. Only who
// has received from done may call it: then no queue and no worker has the operation
// any more. Nobody has to: what is abandoned, or waited for by nobody, is left to the
// collector.
func (o *op) recycle() result {
	r := o.result
	*o = op{done: o.done}
	ops.Put(o)
	return r
}

type opKind int

const (
	opRelease opKind = iota
	opLookup
	opAnnounce
	opAcquire
	opWithdraw
	opRepeat // of any kind: it was in a batch that failed and is to be done alone
	opKinds
)

type opState int

const (
	opQueued    opState = iota
	opAbandoned         // its caller is gone
	opDone              // the answer is on its way
)

func newSession(dsn string, conf LockProviderConfig) *session {
	s := &session{
		dsn:   dsn,
		log:   conf.logger,
		hub:   newHub(),
		held:  map[int64]hold{},
		done:  make(chan struct{}),
		brief: make(chan struct{}, 1),
	}
	for i := range s.lanes {
		s.lanes[i] = &lane{session: s, index: uint8(i), wake: make(chan struct{}, 1), taken: map[int64]bool{}}
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	if conf.postgres != nil {
		s.serviceName = conf.postgres.serviceName
	}
	return s
}

func (s *session) events() *hub { return s.hub }

func (s *session) newID() uuid.UUID { return uuid.New() }

func (s *session) lookup(ctx context.Context, repo string, pr uint) (int64, error) {
	o := newOp(ctx, opLookup, claim{})
	o.pull = &pullRequest{repo, pr}
	r := s.do(nil, o)
	return r.key, r.err
}

func (s *session) announce(ctx context.Context, stop <-chan struct{}, a announcement) (answer, error) {
	var r result
	for range 3 { // the second time a row that was missing is there
		o := newOp(ctx, opAnnounce, a.claim)
		o.order, o.take, o.pull = a.order, a.take, a.pull
		r = s.do(stop, o)
		if !errors.Is(r.err, errRowChanged) {
			break
		}
	}
	return r.answer, r.err
}

func (s *session) withdraw(c claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.lanes[0].link != nil && !s.closing { // without a link the database knows
		s.enqueueLocked(newOp(context.Background(), opWithdraw, c))
	}
}

func (s *session) acquire(ctx context.Context, stop <-chan struct{}, r request) (answer, error) {
	o := newOp(ctx, opAcquire, claim{})
	o.req = r
	res := s.do(stop, o)
	return res.answer, res.err
}

func (s *session) release(ctx context.Context, c claim) *op {
	o := newOp(ctx, opRelease, c)
	s.mu.Lock()
	h, holds := s.held[c.key]
	holds = holds && h.id == c.id // not a successor's
	if holds {
		s.enqueueLocked(o)
	}
	s.mu.Unlock()
	if !holds {
		o.err = errReleaseLost
		o.done <- struct{}{}
	}
	return o
}

var errReleaseLost = errors.WithMessage(ErrLockLost, "session lost")

// do has the worker carry out an operation. If its context or stop ends first, an
// operation that is still queued is dropped, and a key that an abandoned one
// acquires is released.
func (s *session) do(stop <-chan struct{}, o *op) result {
	ctx := o.ctx
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return result{err: ErrProviderClosed}
	}
	s.enqueueLocked(o)
	s.mu.Unlock()
	reason := errStopped
	select {
	case <-o.done:
		return o.recycle()
	case <-stop:
	case <-ctx.Done():
		reason = contextError(ctx)
	}
	s.mu.Lock()
	done := o.state == opDone
	if !done {
		o.state = opAbandoned
	}
	trouble := s.trouble
	s.mu.Unlock()
	switch {
	case done:
		<-o.done
		return o.recycle()
	case trouble == nil:
	case reason == errStopped:
		reason = &joinedError{errUnavailable, trouble}
	default:
		reason = errors.WithMessage(reason, trouble.Error())
	}
	return result{err: reason}
}

func (s *session) enqueueLocked(o *op) {
	o.queued = time.Now()
	ln := s.laneLocked(o)
	ln.queues[o.kind] = append(ln.queues[o.kind], o)
	if !s.started {
		s.started = true
		go s.run() // ends with close
	}
	ln.wakeUpLocked()
}

// laneLocked says whose an operation is. Two that claim the same key are never under
// way on two lanes: a claim that was given up must not overtake its caller's next.
func (s *session) laneLocked(o *op) *lane {
	kind := o.kind
	switch {
	case kind == opRelease:
		return s.lanes[s.held[o.req.key].lane]
	case s.duty == dutyClaims && kind != opLookup:
		return s.lanes[half(o.req.key)]
	}
	return s.lanes[0]
}

// half of the keys, whatever their pattern.
func half(key int64) int { return int(uint64(key) * 0x9e3779b97f4a7c15 >> 63) }

// rerouteLocked moves what is queued to the lane whose it is now.
func (s *session) rerouteLocked() {
	for _, from := range s.lanes {
		for k, q := range from.queues {
			from.queues[k] = slices.DeleteFunc(q, func(o *op) bool {
				to := s.laneLocked(o)
				if to != from {
					to.queues[k] = append(to.queues[k], o)
				}
				return to != from
			})
		}
		from.wakeUpLocked()
	}
}

func (s *session) queuedLocked() int { return s.lanes[0].queuedLocked() + s.lanes[1].queuedLocked() }

// close answers once the session has given back everything, and all of its
// connections and goroutines are gone. What is queued is still carried out.
func (s *session) close() {
	s.mu.Lock()
	s.closing = true
	started := s.started
	for _, ln := range s.lanes {
		ln.wakeUpLocked()
	}
	s.mu.Unlock()
	s.stop()
	if !started {
		return
	}
	limit := time.AfterFunc(releaseTimeout, func() {
		s.mu.Lock()
		l := s.lanes[0].link
		s.mu.Unlock()
		s.lose(l, ErrProviderClosed)
	})
	defer limit.Stop()
	<-s.done
}

// run is the first lane's worker.
func (s *session) run() {
	defer close(s.done)
	s.listener = startListener(s)
	defer s.listener.close()
	backoff := reopenMin
	for s.awaitWork() {
		l, err := s.open()
		if err == nil {
			opened := time.Now()
			err = s.lanes[0].serve(l)
			if !s.lose(l, err) {
				err = errReleaseLost // by somebody else, who has told why
			}
			l.close()
			s.awaitSecond()
			if err == nil || time.Since(opened) > heartbeatInterval {
				backoff = reopenMin
				continue
			}
		}
		// It could not be opened, or did not live to see its second heartbeat.
		s.mu.Lock()
		s.trouble = err
		s.mu.Unlock()
		s.refuseQueued(err)
		select {
		case <-time.After(backoff):
		case <-s.ctx.Done():
		}
		backoff = min(2*backoff, reopenMax)
	}
}

// awaitWork blocks until there is work, or answers false once there will be none.
func (s *session) awaitWork() bool {
	for {
		s.mu.Lock()
		work, closing := s.lanes[0].workLocked(), s.closing
		s.mu.Unlock()
		if closing {
			s.refuseQueued(ErrProviderClosed)
			return false
		}
		if work {
			return true
		}
		<-s.lanes[0].wake
	}
}

// refuseQueued fails what waits for a session that cannot be opened: everything
// if waiting is of no use, otherwise what has waited for long enough.
func (s *session) refuseQueued(reason error) {
	var refusal refusedError
	all := errors.As(reason, &refusal) || errors.Is(reason, ErrProviderClosed)
	if all && refusal.error != nil {
		s.log.Error("locker: session refused", slog.String("error", reason.Error()))
	}
	if !all {
		reason = &joinedError{errUnavailable, reason}
	}
	var failed []*op
	s.mu.Lock()
	queues := &s.lanes[0].queues // the second lane has none without a session
	for k, q := range queues {
		queues[k] = slices.DeleteFunc(q, func(o *op) bool {
			fail := all || time.Since(o.queued) > patience || o.state == opAbandoned
			if fail {
				failed = append(failed, o)
			}
			return fail
		})
	}
	s.mu.Unlock()
	s.lanes[0].finish(nil, failed, reason)
}

// open makes the next link and proves that it can work (C27).
func (s *session) open() (*link, error) {
	s.mu.Lock()
	s.generation++
	generation := s.generation
	s.mu.Unlock()
	l, err := openLink(s.ctx, s.dsn, s.serviceName, generation)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(s.ctx, l.kill) // until it is open: then what is queued is still carried out
	defer stop()
	if !s.proven {
		if err := s.proveNotify(l); err != nil {
			l.close()
			return nil, err
		}
		s.proven = true
	}
	if err := l.setUp(); err != nil {
		l.close()
		return nil, err
	}
	if err := l.takeNumber(); err != nil {
		l.close()
		return nil, err
	}
	s.mu.Lock()
	s.trouble = nil
	s.lanes[0].beginLocked(l, l)
	s.mu.Unlock()
	if generation > 1 {
		s.log.Info("locker: session is open again", slog.Int("backend_pid", l.pid))
	}
	return l, nil
}

// proveNotify sends a notification to ourselves, by a statement that was prepared
// before: it also proves that such statements last. Later a notification may be
// missing for a while: that costs speed, not safety.
func (s *session) proveNotify(l *link) error {
	limit := time.AfterFunc(openTimeout, l.kill)
	defer limit.Stop()
	nonce := uuid.New()
	arrived := s.listener.expect(nonce)
	payload := `{"kind":"` + kindCheck + `","id":"` + nonce.String() + `"}`
	deadline := time.After(checkTimeout)
	for {
		if _, err := l.prove.ExecContext(context.Background(), payload); err != nil {
			return errors.Wrap(poolerError(err), "locker: check that NOTIFY arrives")
		}
		select {
		case <-arrived:
			return nil
		case <-s.ctx.Done():
			return ErrProviderClosed
		case <-time.After(checkTimeout / 12):
		case <-deadline:
			if err := s.listener.trouble(); err != nil {
				return errors.Wrap(err, "locker: listen for notifications")
			}
			return refused("a NOTIFY to ourselves did not arrive within %v: a proxy in transaction-pooling mode is in between; connect to PostgreSQL directly or to a pool in session mode", checkTimeout)
		}
	}
}

// cancelStalled cancels what a link is doing, and answers whether it could.
func (s *session) cancelStalled(l *link) bool {
	ctx, cancel := context.WithTimeout(context.Background(), cancelTimeout) // also while the session closes
	defer cancel()
	err := s.briefly(ctx, func(ctx context.Context, db *sql.DB) error {
		_, err := db.ExecContext(ctx, `SELECT pg_cancel_backend($1)`, l.pid)
		return err
	})
	if err != nil {
		s.log.Warn("locker: stalled statement could not be cancelled", slog.String("error", err.Error()))
	}
	return err == nil
}

// briefly lends a connection beside those of the lanes. There is one at a time, and
// it is cut when ctx is done: lib/pq would open another to cancel a statement.
func (s *session) briefly(ctx context.Context, use func(ctx context.Context, db *sql.DB) error) error {
	select {
	case s.brief <- struct{}{}:
		defer func() { <-s.brief }()
	case <-ctx.Done():
		return contextError(ctx)
	}
	connector, err := pq.NewConnector(s.dsn)
	if err != nil {
		return errors.New("postgres URI is invalid")
	}
	l := &link{}
	connector.Dialer(l)
	stop := context.AfterFunc(ctx, l.kill)
	defer stop()
	l.db = sql.OpenDB(connector)
	l.db.SetMaxOpenConns(1)
	defer l.close() // nothing is left to be lost
	err = use(context.WithoutCancel(ctx), l.db)
	if err != nil && ctx.Err() != nil {
		err = contextError(ctx)
	}
	return err
}

// aliveLocked says whether the session that a link belongs to is still open.
func (s *session) aliveLocked(l *link) bool {
	first := s.lanes[0].link
	return l != nil && first != nil && first.generation == l.generation
}

// lose ends the links of both lanes, of which l is the first's, and tells everybody
// who depends on them. It may be called more than once, by anybody; after the first
// time it does nothing and answers false. Without a cause, at the end of close,
// nothing is held or queued any more.
func (s *session) lose(l *link, cause error) bool {
	s.mu.Lock()
	if l == nil || s.lanes[0].link != l {
		s.mu.Unlock()
		return false
	}
	second := s.lanes[1].link
	held := len(s.held)
	s.held, s.moving = map[int64]hold{}, 0
	s.duty = dutyRest
	var releases []*op
	for _, ln := range s.lanes {
		ln.endLocked()
		releases = append(releases, ln.queues[opRelease]...)
		ln.queues[opRelease] = nil
		ln.queues[opRepeat] = slices.DeleteFunc(ln.queues[opRepeat], func(o *op) bool {
			if o.kind == opRelease {
				releases = append(releases, o)
			}
			return o.kind == opRelease
		})
	}
	s.rerouteLocked()
	if s.abort != nil {
		s.abort()
	}
	s.mu.Unlock()

	if cause != nil { // not closed in peace
		s.hub.broadcast(event{kind: evLost, session: l.generation, cause: cause})
	}
	if second != nil {
		second.kill()
	}
	if cause == nil {
		return true
	}
	l.kill()
	s.lanes[0].finish(nil, releases, errReleaseLost)
	s.log.Warn("locker: session lost", slog.Int("held", held), slog.String("cause", cause.Error()), slog.Int("backend_pid", l.pid))
	return true
}

// notified takes a payload from the listener.
func (s *session) notified(payload string) {
	m, err := decodeMessage(payload)
	if err != nil {
		s.log.Debug("locker: foreign notification ignored", slog.String("error", err.Error()))
		return
	}
	switch m.Kind {
	case kindCheck:
		s.listener.arrived(m.ID)
	case kindClaim:
		s.hub.dispatch(m.LockKey, event{kind: evClaimed, from: standing{m.Claim, m.ID}, message: m.Event})
	case kindReleased:
		s.hub.dispatch(m.LockKey, event{kind: evReleased})
	case kindManual:
		s.hub.dispatch(m.LockKey, event{kind: evManual, message: m.Event})
	}
}

// resync asks the database what notifications may have been missed.
func (s *session) resync() {
	s.hub.broadcast(event{kind: evReleased})
}
