package locker

import (
	"cmp"
	"context"
	"crypto/rand"
	"database/sql"
	"database/sql/driver"
	"encoding/binary"
	"encoding/hex"
	"log/slog"
	"runtime"
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

// session is a provider's connection to its database: one link, which holds the
// advisory locks, and one listener. It is the backend of every lock of the
// provider.
//
// Its worker is the only one who uses the link. It takes whatever operations
// have queued up while the last statement ran and sends them as one. The worker
// and the listener start with the first operation and end with close; a link
// that is lost is replaced when there is work again.
type session struct {
	dsn         string
	serviceName string
	log         *slog.Logger
	hub         *hub

	mu         sync.Mutex // guards everything below; never held across I/O
	queues     [opKinds][]*op
	link       *link
	generation uint64              // of the last link; 0 before the first
	trouble    error               // why the last attempt to open a link failed; nil after one that succeeded
	held       map[int64]uuid.UUID // what the link holds: key → the ID of the holder's claim
	started    bool
	closing    bool
	idling     *link         // the worker reads ahead on it; a read deadline in the past ends that
	wake       chan struct{} // capacity 1: there is work, for a worker without a link
	done       chan struct{} // closed when the worker has ended

	ctx  context.Context // ends with close; only the opening of links depends on it
	stop context.CancelFunc

	// The worker's own.
	listener *listener
	next     opKind    // whose turn it is
	proven   bool      // a NOTIFY has arrived
	beat     time.Time   // when the next heartbeat is due
	pulse    *time.Timer // wakes the worker then
	trusted  *time.Timer
	stuck    map[int64]stuckKey
}

// op is one operation of a caller. The caller waits on its channel; the worker
// answers exactly once.
type op struct {
	kind   opKind
	ctx    context.Context // the caller's, for its span
	repo   string          // lookup
	pr     uint            // lookup
	req    request         // acquire: all of it; announce and release: the claim
	order  *int64          // announce: see announcement
	take   bool            // announce
	pull   *pullRequest    // announce
	queued time.Time
	state  opState     // guarded by session.mu
	done   chan result // capacity 1
	freed  chan error  // release, instead of done; capacity 1
}

type result struct {
	key    int64  // lookup
	answer answer // announce and acquire
	err    error
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
		dsn:  dsn,
		log:  conf.logger,
		hub:  newHub(),
		held: map[int64]uuid.UUID{},
		wake: make(chan struct{}, 1),
		done: make(chan struct{}),
	}
	s.ctx, s.stop = context.WithCancel(context.Background())
	if conf.postgres != nil {
		s.serviceName = conf.postgres.serviceName
	}
	return s
}

func (s *session) events() *hub { return s.hub }

func (s *session) lookup(ctx context.Context, repo string, pr uint) (int64, error) {
	r := s.do(ctx, nil, &op{kind: opLookup, repo: repo, pr: pr})
	return r.key, r.err
}

func (s *session) announce(ctx context.Context, stop <-chan struct{}, a announcement) (answer, error) {
	var r result
	for range 3 { // the second time a row that was missing is there
		r = s.do(ctx, stop, &op{kind: opAnnounce, req: request{claim: a.claim}, order: a.order, take: a.take, pull: a.pull})
		if !errors.Is(r.err, errRowChanged) {
			break
		}
	}
	return r.answer, r.err
}

func (s *session) withdraw(c claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.link != nil && !s.closing { // without a link the database knows
		s.enqueueLocked(&op{kind: opWithdraw, ctx: context.Background(), req: request{claim: c}, done: make(chan result, 1)})
	}
}

func (s *session) acquire(ctx context.Context, stop <-chan struct{}, r request) (answer, error) {
	res := s.do(ctx, stop, &op{kind: opAcquire, req: r})
	return res.answer, res.err
}

func (s *session) release(ctx context.Context, c claim) <-chan error {
	o := &op{kind: opRelease, ctx: ctx, req: request{claim: c}, freed: make(chan error, 1)}
	s.mu.Lock()
	id, holds := s.held[c.key]
	holds = holds && id == c.id // not a successor's
	if holds {
		s.enqueueLocked(o)
	}
	s.mu.Unlock()
	if !holds {
		o.freed <- errReleaseLost
	}
	return o.freed
}

var errReleaseLost = errors.WithMessage(ErrLockLost, "session lost")

// do has the worker carry out an operation. If ctx or stop ends first, an
// operation that is still queued is dropped, and a key that an abandoned one
// acquires is released.
func (s *session) do(ctx context.Context, stop <-chan struct{}, o *op) result {
	o.ctx = ctx
	o.done = make(chan result, 1)
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return result{err: ErrProviderClosed}
	}
	s.enqueueLocked(o)
	s.mu.Unlock()
	reason := errStopped
	select {
	case r := <-o.done:
		return r
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
		return <-o.done
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
	s.queues[o.kind] = append(s.queues[o.kind], o)
	if !s.started {
		s.started = true
		go s.run() // ends with close
	}
	s.wakeUpLocked()
}

func (s *session) wakeUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.wakeUpLocked()
}

func (s *session) wakeUpLocked() {
	if s.idling != nil {
		_ = s.idling.socket.SetReadDeadline(time.Unix(1, 0)) // fails only on a connection that has ended
		s.idling = nil
	}
	select {
	case s.wake <- struct{}{}:
	default: // it has been told already
	}
}

// close answers once the session has given back everything, and all of its
// connections and goroutines are gone. What is queued is still carried out.
func (s *session) close() {
	s.mu.Lock()
	s.closing = true
	started := s.started
	s.wakeUpLocked()
	s.mu.Unlock()
	s.stop()
	if !started {
		return
	}
	limit := time.AfterFunc(releaseTimeout, func() {
		s.mu.Lock()
		l := s.link
		s.mu.Unlock()
		s.lose(l, ErrProviderClosed)
	})
	defer limit.Stop()
	<-s.done
}

// run is the worker.
func (s *session) run() {
	defer close(s.done)
	s.listener = startListener(s)
	defer s.listener.close()
	backoff := reopenMin
	for s.awaitWork() {
		l, err := s.open()
		if err == nil {
			opened := time.Now()
			err = s.serve(l)
			s.pulse.Stop()
			s.lose(l, err)
			l.close()
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
		work, closing := s.workLocked(), s.closing
		s.mu.Unlock()
		if closing {
			s.refuseQueued(ErrProviderClosed)
			return false
		}
		if work {
			return true
		}
		<-s.wake
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
	for k, q := range s.queues {
		s.queues[k] = slices.DeleteFunc(q, func(o *op) bool {
			fail := all || time.Since(o.queued) > patience || o.state == opAbandoned
			if fail {
				failed = append(failed, o)
			}
			return fail
		})
	}
	s.mu.Unlock()
	for _, o := range failed {
		s.finish(nil, []*op{o}, []result{{err: reason}})
	}
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
	s.stuck = map[int64]stuckKey{}
	l.stall.cancel = func() { s.cancelStalled(l) }
	s.beat = time.Now()
	s.pulse = time.AfterFunc(heartbeatInterval, s.wakeUp)
	s.mu.Lock()
	s.trusted = time.AfterFunc(lossBound, func() {
		s.lose(l, errors.Errorf("no heartbeat succeeded for %v", lossBound))
	})
	s.link, s.trouble = l, nil
	s.mu.Unlock()
	if generation > 1 {
		s.log.Info("locker: session is open again", slog.Int("backend_pid", l.pid))
	}
	return l, nil
}

// proveNotify sends a notification to ourselves. Later it may be missing for a
// while: that costs speed, not safety.
func (s *session) proveNotify(l *link) error {
	limit := time.AfterFunc(openTimeout, l.kill)
	defer limit.Stop()
	nonce := uuid.New()
	arrived := s.listener.expect(nonce)
	payload := `{"kind":"` + kindCheck + `","id":"` + nonce.String() + `"}`
	deadline := time.After(checkTimeout)
	for {
		if _, err := l.conn.ExecContext(context.Background(), `SELECT pg_notify($1, $2)`, notifyChannel, payload); err != nil {
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

// serve carries out operations and heartbeats until the link fails, which it
// answers, or the session is closed.
func (s *session) serve(l *link) error {
	for {
		if err := s.beatIfDue(l); err != nil {
			return err
		}
		batch, closing := s.take()
		switch {
		case len(batch) > 0:
			if err := s.execute(l, batch); err != nil {
				return err
			}
			s.gather()
		case closing:
			return nil
		default:
			if err := s.idle(l); err != nil {
				return err
			}
		}
	}
}

// gather lets the callers that were just answered come back with their next
// operation, so that it goes into the next batch: it yields for as long as the
// queues grow.
func (s *session) gather() {
	for before := -1; ; {
		s.mu.Lock()
		n := s.queuedLocked()
		s.mu.Unlock()
		if n == before || n >= maxBatch {
			return
		}
		before = n
		runtime.Gosched()
	}
}

func (s *session) queuedLocked() (n int) {
	for _, q := range s.queues {
		n += len(q)
	}
	return n
}

// idle waits until there is work or the next heartbeat is due; it answers an
// error when the connection has ended.
func (s *session) idle(l *link) error {
	s.mu.Lock()
	if s.workLocked() || s.closing || !time.Now().Before(s.beat) {
		s.mu.Unlock()
		return nil
	}
	s.idling = l
	s.mu.Unlock()

	err := l.socket.watch()

	s.mu.Lock()
	s.idling = nil
	_ = l.socket.SetReadDeadline(time.Time{}) // fails only on a connection that has ended
	s.mu.Unlock()
	return errors.Wrap(err, "the connection ended")
}

// workLocked says whether an operation is queued.
func (s *session) workLocked() bool {
	for _, q := range s.queues {
		if slices.ContainsFunc(q, func(o *op) bool { return o.state == opQueued }) {
			return true
		}
	}
	return false
}

// lose ends a link and tells everybody who depends on it. It may be called more
// than once, by anybody; after the first time it does nothing.
func (s *session) lose(l *link, cause error) {
	s.mu.Lock()
	if l == nil || s.link != l {
		s.mu.Unlock()
		return
	}
	s.link = nil
	held, trusted := len(s.held), s.trusted
	s.held = map[int64]uuid.UUID{}
	releases := s.queues[opRelease]
	s.queues[opRelease] = nil
	s.queues[opRepeat] = slices.DeleteFunc(s.queues[opRepeat], func(o *op) bool {
		if o.kind == opRelease {
			releases = append(releases, o)
		}
		return o.kind == opRelease
	})
	s.mu.Unlock()

	trusted.Stop()
	if cause == nil { // closed in peace
		return
	}
	s.hub.broadcast(event{kind: evLost, session: l.generation, cause: cause})
	l.kill()
	for _, o := range releases {
		s.finish(nil, []*op{o}, []result{{err: errReleaseLost}})
	}
	s.log.Warn("locker: session lost", slog.Int("held", held), slog.String("cause", cause.Error()), slog.Int("backend_pid", l.pid))
}

// take answers the next batch: as many operations of one kind as there are, but
// only one for each key, since the statements could not tell two apart. The
// kinds take turns. What is to be repeated is taken alone, and before whatever else
// is of its kind and key.
func (s *session) take() (batch []*op, closing bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for range opKinds {
		kind := s.next
		s.next = (s.next + 1) % opKinds
		q := s.queues[kind]
		if len(q) == 0 {
			continue
		}
		limit := maxBatch
		keys := make(map[int64]bool, min(len(q), maxBatch))
		if kind == opRepeat {
			limit = 1
		} else {
			for _, o := range s.queues[opRepeat] {
				keys[o.req.key] = keys[o.req.key] || o.kind == kind
			}
		}
		s.queues[kind] = slices.DeleteFunc(q, func(o *op) bool {
			switch {
			case o.state == opAbandoned:
				return true
			case len(batch) == limit, kind != opLookup && keys[o.req.key]:
				return false
			}
			keys[o.req.key] = true
			batch = append(batch, o)
			return true
		})
		if len(batch) > 0 {
			break
		}
	}
	slices.SortFunc(batch, func(a, b *op) int {
		return cmp.Or(cmp.Compare(a.req.key, b.req.key), cmp.Compare(a.repo, b.repo), cmp.Compare(a.pr, b.pr))
	})
	return batch, s.closing
}

// execute carries out a batch. It answers an error only if the link is gone. If
// the statement fails, the operations are queued again to be repeated one by one,
// so that only the one at fault gets the error.
func (s *session) execute(l *link, batch []*op) error {
	if err := s.beatIfDue(l); err != nil {
		s.finish(l, batch, allFailed(batch, &joinedError{errUnavailable, err}))
		return err
	}
	if batch = s.refuseStuck(l, batch); len(batch) == 0 {
		return nil
	}
	l.stall.begin()
	ctx := context.WithoutCancel(batch[0].ctx)
	results, err := s.statement(ctx, l, batch)
	if l.stall.end() && err == nil {
		for i := range results { // committed, but by the primary alone
			if k := batch[i].kind; k == opAcquire || results[i].answer.outcome == granted {
				results[i].err = errStalled
			}
		}
	}
	if err == nil {
		s.finish(l, batch, results)
		return nil
	}
	if l.broken(err) {
		if batch[0].kind == opLookup { // harmless to repeat in the next session
			s.mu.Lock()
			s.queues[opLookup] = append(batch, s.queues[opLookup]...)
			s.mu.Unlock()
		} else {
			s.finish(l, batch, allFailed(batch, &joinedError{errUnavailable, err}))
		}
		return err
	}
	alone := len(batch) == 1
	if err2 := s.undo(ctx, l, batch); err2 != nil {
		s.finish(l, batch, allFailed(batch, &joinedError{errUnavailable, err2}))
		return err2
	}
	if alone {
		if batch[0].kind == opRelease && isLockTableFull(err) { // giving back made room
			_, err = s.statement(ctx, l, batch)
		}
		if batch[0].kind == opRelease && err != nil { // the key is free; the row still names the holder, so its successor waits the delay
			s.log.Warn("locker: released without clearing the holder", slog.Int64("key", batch[0].req.key), slog.String("error", err.Error()))
			err = nil
		}
		err = statementError(err)
		if errors.Is(err, errRowLocked) {
			s.stuck[batch[0].req.key] = stuckKey{time.Now().Add(stuckPause), err}
		}
		s.finish(l, batch, []result{{err: err}})
		return nil
	}
	s.mu.Lock()
	s.queues[opRepeat] = append(s.queues[opRepeat], batch...)
	s.mu.Unlock()
	return nil
}

// stuckKey is a key whose row somebody else keeps locked. Every try costs all
// callers the lock_timeout, so it is not tried again for a while.
type stuckKey struct {
	until time.Time
	err   error
}

// refuseStuck fails what would only wait for a locked row, and answers the rest
// of the batch.
func (s *session) refuseStuck(l *link, batch []*op) []*op {
	if len(s.stuck) == 0 || batch[0].kind != opAnnounce && batch[0].kind != opAcquire {
		return batch
	}
	var rest []*op
	for _, o := range batch {
		stuck, ok := s.stuck[o.req.key]
		switch {
		case ok && time.Now().Before(stuck.until):
			s.finish(l, []*op{o}, []result{{err: stuck.err}})
			continue
		case ok:
			delete(s.stuck, o.req.key)
		}
		rest = append(rest, o)
	}
	return rest
}

var errStalled = errors.New("locker: the commit waits for a synchronous standby that does not answer")

// stallWatch cancels a statement that does not end. The server's own timeouts bound
// all of a statement but its commit, which may wait for a synchronous standby for
// ever, and then returns as if nothing had been.
type stallWatch struct {
	cancel func()

	mu         sync.Mutex    // guards everything below
	began      time.Time     // of the statement in flight; zero while there is none
	timer      *time.Timer   // left running after a statement: to set it costs more than to look
	running    bool          // the timer
	cancelling chan struct{} // the statement in flight was cancelled; closed when that is over
}

func (w *stallWatch) begin() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.began = time.Now()
	switch {
	case w.timer == nil:
		w.timer = time.AfterFunc(stallTimeout, w.look)
	case !w.running:
		w.timer.Reset(stallTimeout)
	}
	w.running = true
}

func (w *stallWatch) look() {
	w.mu.Lock()
	if left := stallTimeout - time.Since(w.began); !w.began.IsZero() && left > 0 {
		w.timer.Reset(left)
		w.mu.Unlock()
		return
	}
	w.running = false
	if w.began.IsZero() {
		w.mu.Unlock()
		return
	}
	over := make(chan struct{})
	w.cancelling = over
	w.mu.Unlock()
	defer close(over)
	w.cancel()
}

// end answers whether the statement was cancelled.
func (w *stallWatch) end() bool {
	w.mu.Lock()
	w.began = time.Time{}
	over := w.cancelling
	w.cancelling = nil
	w.mu.Unlock()
	if over == nil {
		return false
	}
	select { // or the cancellation might hit the next statement
	case <-over:
	case <-time.After(cancelTimeout):
	}
	return true
}

func (s *session) cancelStalled(l *link) {
	if err := cancelBackend(s.ctx, s.dsn, l.pid); err != nil {
		s.log.Warn("locker: stalled statement could not be cancelled", slog.String("error", err.Error()))
	}
}

// undo frees the advisory locks that a failed statement may have taken, or
// should have freed: session-level locks survive a rollback.
func (s *session) undo(ctx context.Context, l *link, batch []*op) error {
	kind := batch[0].kind
	if kind != opAnnounce && kind != opAcquire && kind != opRelease || kind == opRelease && len(batch) > 1 {
		return nil
	}
	var keys []int64
	s.mu.Lock()
	for _, o := range batch {
		if _, holds := s.held[o.req.key]; !holds || kind == opRelease {
			keys = append(keys, o.req.key)
		}
	}
	s.mu.Unlock()
	return s.giveBack(ctx, l, keys)
}

func (s *session) giveBack(ctx context.Context, l *link, keys []int64) error {
	_, err := l.giveBack.ExecContext(ctx, pq.Array(keys))
	if err != nil && !l.broken(err) {
		// What was freed stays free. The notification may have found no room in the
		// lock table; what is free already is not notified again.
		_, err = l.giveBack.ExecContext(ctx, pq.Array(keys))
	}
	return errors.Wrap(err, "locker: give keys back")
}

func allFailed(batch []*op, err error) []result {
	results := make([]result, len(batch))
	for i := range results {
		results[i].err = err
	}
	return results
}

// statementError says what an operator can do about a statement that failed.
func statementError(err error) error {
	switch e := pq.As(err); {
	case e == nil:
		return err
	case isLockTableFull(err):
		return errors.WithMessage(err, "locker: the server's lock table is full: raise max_locks_per_transaction (the table has room for about max_locks_per_transaction × max_connections locks)")
	case e.Code == "55P03", e.Code == "57014":
		return &joinedError{errRowLocked, err}
	}
	return err
}

func isLockTableFull(err error) bool {
	e := pq.As(err)
	return e != nil && e.Code == "53200"
}

// broken says whether an error means the end of the link.
func (l *link) broken(err error) bool {
	e := pq.As(err)
	return e == nil || e.Fatal()
}

// finish hands out results. It registers what the link now holds, and releases
// what was acquired for a caller that is gone.
func (s *session) finish(l *link, batch []*op, results []result) {
	s.mu.Lock()
	for i, o := range batch {
		r := &results[i]
		switch {
		case o.kind == opRelease:
			if s.held[o.req.key] == o.req.id { // not a successor's
				delete(s.held, o.req.key)
			}
			if errors.Is(r.err, errUnavailable) {
				r.err = errReleaseLost
			}
		case r.answer.outcome != granted:
			if o.kind == opAnnounce && o.state == opAbandoned && r.err == nil && s.link == l {
				s.enqueueLocked(&op{kind: opWithdraw, ctx: o.ctx, req: o.req, done: make(chan result, 1)})
			}
		case s.link != l:
			*r = result{err: &joinedError{errUnavailable, errReleaseLost}}
		default:
			s.held[o.req.key] = o.req.id
			if o.state == opAbandoned || r.err != nil {
				s.enqueueLocked(&op{kind: opRelease, ctx: o.ctx, req: o.req, freed: make(chan error, 1)})
			}
		}
		o.state = opDone
	}
	s.mu.Unlock()
	for i, o := range batch {
		if o.kind == opRelease {
			o.freed <- results[i].err
		} else {
			o.done <- results[i]
		}
	}
}

// statement carries out a batch and answers the results in its order.
func (s *session) statement(ctx context.Context, l *link, batch []*op) ([]result, error) {
	switch batch[0].kind {
	case opLookup:
		return s.lookupKeys(ctx, l, batch)
	case opAnnounce:
		return s.announceClaims(ctx, l, batch)
	case opAcquire:
		return s.acquireKeys(ctx, l, batch)
	case opWithdraw:
		return s.withdrawClaims(ctx, l, batch)
	default:
		return s.releaseKeys(ctx, l, batch)
	}
}

// lookupKeys finds the keys of pull requests, and makes those that are missing.
func (s *session) lookupKeys(ctx context.Context, l *link, batch []*op) ([]result, error) {
	results := make([]result, len(batch))
	todo := make([]int, len(batch)) // indexes of the batch
	for i := range todo {
		todo[i] = i
	}
	for attempt := range 4 {
		var repos pq.StringArray
		var prs, keys pq.Int64Array
		for _, i := range todo {
			repos = append(repos, batch[i].repo)
			prs = append(prs, int64(batch[i].pr))
			keys = append(keys, randomKey())
		}
		if attempt > 0 { // the second time the rows are missing, later a random key was taken
			if _, err := l.addKeys.ExecContext(ctx, repos, prs, keys); err != nil {
				return nil, err
			}
		}
		found := make([]bool, len(batch))
		var ord int
		var key int64
		err := each(ctx, l.lookup, []any{repos, prs}, []any{&ord, &key}, func() {
			i := todo[ord-1]
			results[i].key, found[i] = key, true
		})
		if err != nil {
			return nil, err
		}
		todo = slices.DeleteFunc(todo, func(i int) bool { return found[i] })
		if len(todo) == 0 {
			return results, nil
		}
	}
	for _, i := range todo {
		results[i].err = errors.New("locker: env_locks did not take a new key")
	}
	return results, nil
}

// randomKey is a positive number: a key that no other pull request has, all but
// certainly.
func randomKey() int64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return int64(binary.BigEndian.Uint64(b[:])>>1) | 1
}

func (s *session) announceClaims(ctx context.Context, l *link, batch []*op) ([]result, error) {
	results := make([]result, len(batch))
	args, takes := s.announceArgs(l, batch)
	announced := make([]bool, len(batch))
	var taken pq.Int64Array
	var unflushed bool
	var key, number int64
	var token sql.NullInt64
	var age sql.NullFloat64
	var noFlush sql.NullBool
	row := []any{&key, &number, &token, &age, &noFlush, discard}
	err := each(ctx, l.announce, args, row, func() {
		i := find(batch, key)
		announced[i] = true
		a := &results[i].answer
		a.outcome, a.newest = again, standing{number, batch[i].req.id}
		if token.Valid {
			a.grant(token.Int64, age, l)
			taken = append(taken, key)
		}
		unflushed = unflushed || noFlush.Valid
	})
	if err != nil {
		return nil, err
	}
	// From here on an error fails only the keys that it is about.
	if len(taken) > 0 && unflushed {
		_, err = l.flush.ExecContext(ctx)
		err = l.failKeys(batch, results, taken, err) // and they are released
	}
	if slices.Contains(announced, false) && err == nil {
		err = s.whyNot(ctx, l, batch, results, announced, takes)
	}
	return results, err
}

// announceArgs are the arguments of sqlAnnounce, and which claims are to take
// their keys. An array that is too short goes on with NULLs, and hardly any claim
// needs the orders and the waits.
func (s *session) announceArgs(l *link, batch []*op) (args []any, takes []bool) {
	keys, ids := keysAndIDs(batch)
	n := len(batch)
	events, repos, pulls := make(pq.StringArray, n), make(pq.StringArray, n), make(pq.Int64Array, n)
	takes = make([]bool, n)
	var orders []*int64
	var waits []*bool
	yes := true
	s.mu.Lock()
	for i, o := range batch {
		events[i] = o.req.event
		repos[i], pulls[i] = o.pull.columns()
		if o.order != nil {
			orders = append(orders, make([]*int64, i-len(orders))...)
			orders = append(orders, o.order)
		}
		_, holds := s.held[o.req.key] // advisory locks are re-entrant: never try what this session holds
		takes[i] = o.take && !holds
		if !takes[i] {
			waits = append(waits, make([]*bool, i-len(waits))...)
			waits = append(waits, &yes)
		}
	}
	s.mu.Unlock()
	return []any{keys, ids, events, repos, pulls, pq.Array(orders), pq.Array(waits), l.number, hostName, processID}, takes
}

// columns are the pull request as the statements take it; a pull request that is not
// given has a number below zero.
func (p *pullRequest) columns() (repo string, pr int64) {
	if p == nil {
		return "", -1
	}
	return p.repo, int64(p.pr)
}

// whyNot gives the claims that were not announced their errors, makes the rows that
// are missing, and gives back the keys that were tried all the same.
func (s *session) whyNot(ctx context.Context, l *link, batch []*op, results []result, announced, takes []bool) error {
	var keys, pulls, missing, tried pq.Int64Array
	var repos pq.StringArray
	for i, o := range batch {
		if announced[i] {
			continue
		}
		results[i].err = errRowChanged
		repo, pr := o.pull.columns()
		keys, repos, pulls = append(keys, o.req.key), append(repos, repo), append(pulls, pr)
		if takes[i] {
			tried = append(tried, o.req.key)
		}
	}
	var key int64
	var moved, absent bool
	var event sql.NullString
	var top sql.NullInt64
	err := each(ctx, l.whyNot, []any{keys, repos, pulls}, []any{&key, &moved, &absent, &event, &top}, func() {
		i := find(batch, key)
		switch {
		case moved:
			results[i].err = errKeyMoved
		case absent:
			missing = append(missing, key)
		case batch[i].order != nil && top.Valid && *batch[i].order <= top.Int64:
			results[i].err = outdated(*batch[i].order, top.Int64, event.String)
		}
	})
	err = l.failKeys(batch, results, keys, err)
	if len(missing) > 0 && err == nil {
		_, err = l.ensure.ExecContext(ctx, missing)
		err = l.failKeys(batch, results, missing, err)
	}
	if len(tried) > 0 && err == nil {
		err = l.failKeys(batch, results, tried, s.giveBack(ctx, l, tried))
	}
	return err
}

var (
	errKeyMoved   = errors.New("locker: the pull request has another key")
	errRowChanged = errors.New("locker: somebody deletes or changes the key's row in env_lock_state again and again")
)

// grant says that the link holds the key since the statement that made the
// token; age is how long ago, in seconds, a predecessor was found dead.
func (a *answer) grant(token int64, age sql.NullFloat64, l *link) {
	a.outcome, a.token, a.session = granted, token, l.generation
	if age.Valid {
		a.drain = min(uncleanDelay, max(0, uncleanDelay-time.Duration(age.Float64*float64(time.Second))))
	}
}

func (s *session) withdrawClaims(ctx context.Context, l *link, batch []*op) ([]result, error) {
	keys, ids := keysAndIDs(batch)
	_, err := l.withdraw.ExecContext(ctx, keys, ids)
	return make([]result, len(batch)), err
}

func keysAndIDs(batch []*op) (pq.Int64Array, uuidArray) {
	keys, ids := make(pq.Int64Array, len(batch)), make(uuidArray, len(batch))
	for i, o := range batch {
		keys[i], ids[i] = o.req.key, o.req.id
	}
	return keys, ids
}

// uuidArray is an argument of type uuid[].
type uuidArray []uuid.UUID

func (a uuidArray) Value() (driver.Value, error) {
	const width = 2 * len(uuid.UUID{})
	text := make([]byte, 1, 2+(width+1)*len(a))
	text[0] = '{'
	for i, id := range a {
		if i > 0 {
			text = append(text, ',')
		}
		text = hex.AppendEncode(text, id[:])
	}
	return string(append(text, '}')), nil
}

func (s *session) acquireKeys(ctx context.Context, l *link, batch []*op) ([]result, error) {
	keys, ids := keysAndIDs(batch)
	n := len(batch)
	claims, claimIDs := make(pq.Int64Array, n), make(uuidArray, n)
	events := make(pq.StringArray, n)
	firsts, tryables := make(pq.BoolArray, n), make(pq.BoolArray, n)
	s.mu.Lock()
	for i, o := range batch {
		_, holds := s.held[o.req.key] // as above
		claims[i], claimIDs[i] = o.req.standing.number, o.req.standing.id
		firsts[i], tryables[i], events[i] = o.req.first, !holds, o.req.event
	}
	s.mu.Unlock()

	results := make([]result, len(batch))
	var missing, refused, unheard pq.Int64Array
	var unheardIDs uuidArray
	got := map[int64]bool{} // the advisory lock, but not yet the row
	args := []any{keys, ids, claims, claimIDs, firsts, tryables, events, hostName, processID, l.number}
	var key int64
	var gone, hidden, have bool
	var valid sql.NullBool
	var number, token sql.NullInt64
	var id uuid.NullUUID
	var newestEvent sql.NullString
	var age sql.NullFloat64
	row := []any{&key, &gone, &hidden, &valid, &have, &number, &id, &newestEvent, &token, &age}
	err := each(ctx, l.acquire, args, row, func() {
		o := batch[find(batch, key)]
		a := &results[find(batch, key)].answer
		if number.Valid {
			a.newest = standing{number.Int64, id.UUID}
		}
		switch {
		case token.Valid:
			a.grant(token.Int64, age, l)
			delete(got, key)
		case gone:
			a.outcome = again
			missing = append(missing, key)
		case have:
			a.outcome = again // unless its row follows
			got[key] = true
		case !valid.Bool:
			a.outcome = superseded
			a.event = newestEvent.String
		default:
			a.outcome = busy
			if hidden || o.req.first || o.req.standing.id != o.req.id {
				unheard = append(unheard, key)
				unheardIDs = append(unheardIDs, o.req.id)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	for key := range got {
		refused = append(refused, key)
	}
	if len(refused) > 0 { // a newer claim came in between
		if err := s.giveBack(ctx, l, refused); err != nil {
			return nil, err
		}
	}
	if len(missing) > 0 {
		_, err = l.ensure.ExecContext(ctx, missing)
		err = l.failKeys(batch, results, missing, err)
	}
	if len(unheard) > 0 && err == nil {
		// Try once more after asking to be told: the release may have been just before.
		var asked bool
		err = each(ctx, l.wait, []any{unheard, unheardIDs, l.number}, []any{&key, &asked, discard, discard}, func() {
			if asked {
				results[find(batch, key)].answer.outcome = again
			}
		})
		err = l.failKeys(batch, results, unheard, err)
	}
	return results, err
}

// failKeys gives the operations on keys the error of a statement that was about
// them alone; the others keep their results. It answers an error if the link is
// gone.
func (l *link) failKeys(batch []*op, results []result, keys []int64, err error) error {
	if err == nil || l.broken(err) {
		return err
	}
	for _, key := range keys {
		results[find(batch, key)].err = statementError(err)
	}
	return nil
}

func (s *session) releaseKeys(ctx context.Context, l *link, batch []*op) ([]result, error) {
	keys, ids := keysAndIDs(batch)
	cleared := make([]bool, len(batch))
	var key int64
	err := each(ctx, l.release, []any{keys, ids}, []any{&key, discard, discard, discard}, func() {
		cleared[find(batch, key)] = true
	})
	if err != nil {
		return nil, err
	}
	var rest []int64
	for i, key := range keys {
		if !cleared[i] {
			rest = append(rest, key)
		}
	}
	if len(rest) > 0 { // somebody deleted the rows
		if err := s.giveBack(ctx, l, rest); err != nil {
			return nil, err
		}
	}
	return make([]result, len(batch)), nil
}

func (s *session) beatIfDue(l *link) error {
	if time.Now().Before(s.beat) {
		return nil
	}
	return s.heartbeat(l)
}

// heartbeat proves that the session lives, and finds the keys that have a newer
// claim. Trust in the session is anchored to the time at which it started.
func (s *session) heartbeat(l *link) error {
	start := time.Now()
	s.beat = start.Add(heartbeatInterval)
	s.pulse.Reset(heartbeatInterval)
	var keys pq.Int64Array
	var ids uuidArray
	s.mu.Lock()
	for key, id := range s.held {
		keys = append(keys, key)
		ids = append(ids, id)
	}
	s.mu.Unlock()

	type news struct {
		key int64
		ev  event
	}
	var all []news
	var pid int
	var first int
	var key, number sql.NullInt64
	var id uuid.NullUUID
	var text sql.NullString
	err := each(context.Background(), l.heartbeat, []any{keys, ids}, []any{&first, &key, &number, &id, &text}, func() {
		if !key.Valid {
			pid = first
			return
		}
		all = append(all, news{key.Int64, event{kind: evNewest, from: standing{number.Int64, id.UUID}, message: text.String}})
	})
	switch {
	case err != nil && l.broken(err):
		return err
	case err != nil: // the server answered; only the tables cannot be read, because somebody locks them, say
		s.log.Warn("locker: heartbeat could not look for newer claims", slog.String("error", err.Error()))
	case pid != l.pid:
		return errPooler
	}
	s.trusted.Reset(lossBound - time.Since(start))
	for _, n := range all {
		s.hub.dispatch(n.key, n.ev)
	}
	return nil
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

// find is the place of key's operation in a batch that is sorted by key.
func find(batch []*op, key int64) int {
	i, _ := slices.BinarySearchFunc(batch, key, func(o *op, key int64) int { return cmp.Compare(o.req.key, key) })
	return i
}

// discard takes a column that only has a side effect.
var discard discardedColumn

type discardedColumn struct{}

func (discardedColumn) Scan(any) error { return nil }

// each scans every row of a prepared query into row, and then calls f.
func each(ctx context.Context, stmt *sql.Stmt, args, row []any, f func()) error {
	rows, err := stmt.QueryContext(ctx, args...)
	if err != nil {
		return err
	}
	defer func() { _ = rows.Close() }() // its error is that of Err
	for rows.Next() {
		if err := rows.Scan(row...); err != nil {
			return err
		}
		f()
	}
	return rows.Err()
}
