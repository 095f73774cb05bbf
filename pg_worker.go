package locker

import (
	"cmp"
	"context"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/pkg/errors"
)

const (
	maxBatch = 512 // operations in one statement
	// With fewer operations than this, a worker waits for the other one's batch, but only until
	// maxTogether after that was taken. See together.
	fewOps      = 16
	maxTogether = 20 * time.Millisecond

	repeatMin = 100 * time.Millisecond // before an operation that the server rejected is repeated, doubled with each
	repeatMax = 2 * time.Second
)

// op is one operation of a caller. The caller receives from done. The worker sends to done exactly
// once.
type op struct {
	kind    opKind
	acquire bool            // announce: see announcement
	ctx     context.Context // of the caller, for its span
	// For a lookup. For an announcement see announcement.
	pull  *pullRequest
	terms terms     // announce: see announcement
	asked time.Time // announce: when its caller asked for it
	// For an acquire, all of it. For announce, withdraw and release, the claim.
	req  request
	call func(context.Context, *link) error // call: the function to call
	once bool                               // call: the caller gets the server's errors

	// Guarded by the session's mu.
	state opState
	// Guarded by the session's mu: why the last attempt has failed.
	trouble error

	// Used only by the worker, like result before done.
	attempts  int       // the number of those that failed
	notBefore time.Time // the earliest time of the next attempt
	alone     bool      // its batch has failed, so it runs alone
	doubt     bool      // an attempt has failed that may have been carried out, or was in part
	keyLocked bool      // acquire: see lockKeys
	untried   bool      // acquire: see lockKeys
	result
	done chan struct{} // capacity 1
}

type result struct {
	// Whether a row was about the operation. For an acquire: whether the row says that it waits.
	found    bool
	key      int64    // lookup
	answer   answer   // announce and acquire
	keyState keyState // explain
	err      error
}

var ops = sync.Pool{New: func() any { return &op{done: make(chan struct{}, 1)} }}

// newOp returns an operation of the pool.
func newOp(ctx context.Context, kind opKind, c claim) *op {
	o := ops.Get().(*op)
	o.ctx, o.kind, o.req.claim = ctx, kind, c
	return o
}

// recycle returns the operation's result and puts the operation back into the pool. Call it only
// after receiving from o.done: then no queue and no worker has the operation any longer. Calling it
// is optional: an operation for which no caller waits is garbage collected.
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
	opExplain
	opCall // any other operation, always alone in its batch
	opKinds
)

type opState int

const (
	opQueued    opState = iota
	opAbandoned         // its caller has left
	opDone              // the result is on its way
)

func (s *session) lookup(ctx context.Context, stop <-chan struct{}, repo string, pr uint) (int64, error) {
	o := newOp(ctx, opLookup, claim{})
	o.pull = &pullRequest{repo, pr}
	r := s.do(stop, o)
	return r.key, r.err
}

func (s *session) announce(ctx context.Context, stop <-chan struct{}, a announcement) (answer, error) {
	o := newOp(ctx, opAnnounce, a.claim)
	o.terms, o.acquire, o.pull, o.asked = a.terms, a.acquire && !s.conf.originalReplicas, a.pull, a.asked
	r := s.do(stop, o)
	return r.answer, r.err
}

func (s *session) explain(ctx context.Context, stop <-chan struct{}, key int64) (keyState, error) {
	r := s.do(stop, newOp(ctx, opExplain, claim{key: key}))
	return r.keyState, r.err
}

func (s *session) withdraw(c claim) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing && s.started {
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
	o := newOp(context.WithoutCancel(ctx), opRelease, c)
	s.mu.Lock()
	defer s.mu.Unlock()
	// Nothing was ever taken.
	if !s.started {
		o.done <- struct{}{}
		return o
	}
	s.used = time.Now()
	s.enqueueLocked(o)
	return o
}

// enqueueCheck makes the swift worker call f. If f fails, the worker calls it again until it
// succeeds or ref is no longer the connected session.
func (s *session) enqueueCheck(ref sessionRef, f func(context.Context, *link) error) {
	o := newOp(context.Background(), opCall, claim{})
	o.call = func(ctx context.Context, l *link) error {
		if !s.trust.connectedAs(ref) {
			return nil
		}
		return f(ctx, l)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.enqueueLocked(o)
	}
}

// do makes a worker run an operation, and returns its result. It returns early, with stopped, when
// the operation's context or stop ends. An operation that is still queued then is dropped. If one
// in flight takes a key, the key is released.
func (s *session) do(stop <-chan struct{}, o *op) result {
	ctx := o.ctx
	s.mu.Lock()
	switch {
	case s.closing:
		s.mu.Unlock()
		return result{err: ErrProviderClosed}
	case s.refusal != nil && time.Now().Before(s.retryAt):
		err := s.refusal
		s.mu.Unlock()
		return result{err: err}
	}
	s.used = time.Now()
	s.enqueueLocked(o)
	s.mu.Unlock()
	select {
	case <-o.done:
		return o.recycle()
	case <-stop:
	case <-ctx.Done():
	}
	s.mu.Lock()
	done := o.state == opDone
	if !done {
		o.state = opAbandoned
	}
	trouble := cmp.Or(s.workerOf(o).trouble, o.trouble)
	if s.own == nil && s.trouble != nil {
		trouble = s.trouble
	}
	s.mu.Unlock()
	if done {
		<-o.done
		return o.recycle()
	}
	return result{err: stopped{trouble}}
}

// enqueueLocked queues an operation. It starts the goroutines, and wakes those that it needs.
func (s *session) enqueueLocked(o *op) {
	w := s.workerOf(o)
	w.queues[o.kind] = append(w.queues[o.kind], o)
	if !s.started {
		s.startLocked()
	}
	if s.own == nil {
		signal(s.work)
	}
	if !s.listens {
		signal(s.listen)
	}
	signal(w.wake)
}

// workerOf returns the worker that runs an operation. All announcements go to one worker, so that
// an announcement whose caller has left does not overtake the caller's next one.
func (s *session) workerOf(o *op) *worker {
	if o.kind == opAcquire || o.kind == opAnnounce || o.kind == opExplain {
		return s.disk
	}
	return s.swift
}

// worker runs operations on a separate connection. It sends all operations that have queued up
// during the last statement as one statement.
type worker struct {
	session *session
	wake    chan struct{} // capacity 1: there may be something to do
	done    chan struct{} // closed when run has ended
	ctx     context.Context
	cancel  context.CancelFunc // ends the statement in flight, and run

	// Guarded by the session's mu.
	queues [opKinds][]*op
	begun  time.Time // when the batch in flight was taken, or zero if there is none
	// Nil if none is open. Only the worker's goroutine sets it.
	link    *link
	trouble error // the error of the last attempt to open the connection
	ended   bool  // whether run has ended

	// Used only by the worker's goroutine.
	next  opKind    // the kind whose turn it is
	waits time.Time // when the batch that together waits for was taken
	// The batch in flight. The next one reuses its memory.
	batch []*op
	keys  map[int64]bool
	quiet bool // it runs without NOTIFY
	way   way
}

// newWorker returns a worker that does not run yet.
func newWorker(s *session) *worker {
	w := &worker{session: s, wake: make(chan struct{}, 1), done: make(chan struct{}), keys: map[int64]bool{}, way: way{ask: s.dsn}}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	return w
}

// queuedLocked returns the number of operations that are queued for the worker.
func (w *worker) queuedLocked() (n int) {
	for _, q := range w.queues {
		n += len(q)
	}
	return n
}

// drainLocked removes and returns all queued operations.
func (w *worker) drainLocked() (all []*op) {
	for k, q := range w.queues {
		all = append(all, q...)
		w.queues[k] = nil
	}
	for _, o := range all {
		o.state = opDone
	}
	return all
}

// finish delivers one error to all operations.
func finish(all []*op, err error) {
	for _, o := range all {
		o.result = result{err: err}
		o.done <- struct{}{}
	}
}

// run takes and runs batches. It ends after close was called, when nothing is queued or close has
// stopped waiting.
func (w *worker) run() {
	defer close(w.done)
	defer w.cancel()
	defer w.end()
	defer w.hangUp()
	s := w.session
	idle := time.NewTimer(time.Hour)
	defer idle.Stop()
	for {
		batch, ref, wait, closed := w.nextBatch()
		switch {
		case closed:
			s.mu.Lock()
			rest := w.drainLocked()
			s.unreleased = s.unreleased || slices.ContainsFunc(rest, func(o *op) bool {
				return o.kind == opRelease || o.doubt && (o.kind == opAcquire || o.acquire)
			})
			s.mu.Unlock()
			finish(rest, ErrProviderClosed)
			return
		case len(batch) > 0:
			w.execute(ref, batch)
			// The callers own the operations now.
			clear(batch)
			w.gather()
		case wait == 0:
			w.connect()
		default:
			idle.Reset(wait)
			select {
			case <-w.wake:
				w.gather()
			case <-w.ctx.Done():
			case <-idle.C:
				if wait == s.hangUpAfter() {
					w.hangUp()
				}
			}
		}
	}
}

// end records that run has ended. If a caller that has left may have taken a key, the swift worker
// releases it, so that worker ends last.
func (w *worker) end() {
	w.session.mu.Lock()
	defer w.session.mu.Unlock()
	w.ended = true
	signal(w.session.swift.wake)
}

// gather lets callers queue their next operations, so that these go into one batch. It yields as
// long as the queues grow. A batch of the other worker may just have woken its callers, one after
// the other.
func (w *worker) gather() {
	for before := -1; ; {
		w.session.mu.Lock()
		n := w.queuedLocked()
		w.session.mu.Unlock()
		if n == before || n >= maxBatch {
			return
		}
		before = n
		runtime.Gosched()
	}
}

// nextBatch returns the next batch, and the session that it is for. A batch has operations of one
// kind, and only one for each key, because the statements identify rows by key. The kinds take
// turns. Without a batch, it returns how long to wait for one, which is zero if there would be one
// with a connection, and reports whether there will be none. No key is taken while the session is
// not connected, and no operation runs before it was connected for the first time.
func (w *worker) nextBatch() (batch []*op, ref sessionRef, wait time.Duration, closed bool) {
	s := w.session
	now := time.Now()
	wait = s.hangUpAfter()
	batch = w.batch[:0]
	s.mu.Lock()
	defer s.mu.Unlock()
	ran := !w.begun.IsZero()
	w.begun = time.Time{}
	if w.ctx.Err() != nil {
		return nil, ref, 0, true
	}
	other := s.disk
	if w == s.disk {
		other = s.swift
	}
	// The other worker may have waited for this one.
	if ran && other.queuedLocked() > 0 {
		signal(other.wake)
	}
	if pause := w.together(other, now); pause > 0 {
		return nil, ref, pause, false
	}
	ref, connected := s.trust.current()
	ready := s.proven && (connected || w == s.swift && s.admitted)
	for range opKinds {
		kind := w.next
		w.next = (w.next + 1) % opKinds
		if len(w.queues[kind]) == 0 {
			continue
		}
		clear(w.keys)
		w.queues[kind] = slices.DeleteFunc(w.queues[kind], func(o *op) bool {
			if o.state == opAbandoned {
				s.followUpLocked(o)
				return true
			}
			later := o.notBefore.After(now)
			if later {
				wait = min(wait, o.notBefore.Sub(now))
			}
			full := len(batch) == maxBatch || len(batch) > 0 && (o.alone || batch[0].alone || kind == opCall)
			repeated := kind != opLookup && kind != opCall && w.keys[o.req.key]
			w.keys[o.req.key] = true
			switch {
			case !ready || later || full || repeated:
				return false
			case w.link == nil:
				wait = 0
				return false
			}
			batch = append(batch, o)
			return true
		})
		if len(batch) > 0 {
			break
		}
	}
	w.batch = batch
	if len(batch) > 0 {
		w.begun, w.waits = now, time.Time{}
	}
	slices.SortFunc(batch, func(a, b *op) int {
		// These have no keys yet.
		if a.kind == opLookup && b.kind == opLookup {
			return cmp.Or(cmp.Compare(a.pull.repo, b.pull.repo), cmp.Compare(a.pull.pr, b.pull.pr))
		}
		return cmp.Compare(a.req.key, b.req.key)
	})
	closed = s.closing && (w.queuedLocked() == 0 && (w == s.disk || s.disk.ended) || !s.proven)
	return batch, ref, wait, len(batch) == 0 && closed
}

// together returns how long a worker that has only a few operations should wait for the batch of the
// other worker. The callers that get their results from that batch then queue their next
// operations, and continue in step, so that one statement serves all of them. Otherwise many
// providers with few callers each would spend their time on small statements.
func (w *worker) together(other *worker, now time.Time) time.Duration {
	switch {
	case other.begun.IsZero(), w.queuedLocked() == 0, w.queuedLocked() >= fewOps:
		return 0
	case w.waits.IsZero():
		w.waits = other.begun
	case w.waits != other.begun:
		// That batch has ended, and another one follows.
		return 0
	}
	return max(0, other.begun.Add(maxTogether).Sub(now))
}

// hangUpAfter returns how long a worker keeps its connection without work.
func (s *session) hangUpAfter() time.Duration {
	if idle := s.conf.idleTimeout; idle > 0 {
		return min(idle, s.conf.sessionTimeout)
	}
	return s.conf.sessionTimeout
}

// connect opens the worker's connection. If that fails, it also waits.
func (w *worker) connect() {
	s := w.session
	l, err := openLink(w.ctx, w.way.dsn, s.conf.tracer, s.conf.sessionTimeout)
	s.mu.Lock()
	first := err != nil && w.trouble == nil
	w.link, w.trouble = l, err
	s.mu.Unlock()
	if first {
		s.log.Warn("locker: cannot connect; trying again", slog.String("connection", "statements"), slog.String("error", err.Error()))
	}
	if err != nil {
		w.pause(err)
	}
}

// pause waits before the next attempt to connect.
func (w *worker) pause(err error) {
	w.way.rest(w.ctx, w.way.next(err, w.session.urgent()), err)
}

// hangUp closes the worker's connection, if there is one.
func (w *worker) hangUp() {
	s := w.session
	s.mu.Lock()
	l := w.link
	w.link = nil
	s.mu.Unlock()
	if l != nil {
		l.close()
	}
}

// execute runs a batch. If the statement fails, the operations are repeated: together on a new
// connection if the connection is at fault, and otherwise one by one.
func (w *worker) execute(ref sessionRef, batch []*op) {
	s := w.session
	for _, o := range batch {
		o.result = result{}
	}
	limit := statementTimeout
	// The call may send many statements.
	if batch[0].kind == opCall {
		limit = callTimeout
	}
	// The statement is in the trace of one of the calls that it serves.
	caller := batch[0].ctx
	for _, o := range batch {
		if o.ctx.Value(tracerKey{}) != nil {
			caller = o.ctx
			break
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(caller), limit)
	err := w.statement(ctx, w.link, ref, batch)
	late := ctx.Err() != nil
	cancel()
	switch {
	case err == nil && !late:
		w.way.connected()
		w.finish(batch)
	case late || broken(err):
		// It is not known whether a commit that was canceled has reached a standby, so even a
		// result does not count. The repeat finds what was done, and commits again.
		if late {
			err = errors.Errorf("locker: no answer within %v", limit)
		}
		w.hangUp()
		for _, o := range batch {
			o.doubt = true
		}
		if w == s.disk {
			s.mu.Lock()
			s.unsure = time.Now()
			s.mu.Unlock()
		}
		w.requeue(batch, err)
		if sqlState(err) == "25006" {
			s.dropOwn(errors.WithMessage(err, "the server has become read-only"))
		}
		if batch[0].attempts > 1 {
			w.pause(err)
		}
	default:
		w.rejected(batch, err)
	}
}

// requeue puts operations back into their queue, to be repeated.
func (w *worker) requeue(batch []*op, err error) {
	w.session.mu.Lock()
	defer w.session.mu.Unlock()
	kind := batch[0].kind
	for _, o := range batch {
		o.attempts++
		o.trouble = err
	}
	w.queues[kind] = slices.Concat(batch, w.queues[kind])
	signal(w.wake)
}

// rejected handles a batch that the server has rejected. The caller gets the error if the input is
// at fault. Every other fault may pass, so the operations are repeated until their callers leave:
// without NOTIFY if that is at fault, and otherwise one by one.
func (w *worker) rejected(batch []*op, err error) {
	o := batch[0]
	switch {
	case o.kind == opCall && stateIn(err, "54000"):
		// The queue of notifications is full. A call cannot do without NOTIFY.
	case o.kind != opCall && o.kind != opLookup && !w.quiet && stateIn(err, "54000", "58"):
		// The queue is full, or its files fail.
		w.session.muted(err)
	case len(batch) > 1:
		for _, o := range batch {
			o.alone = true
		}
	case badInput(err), o.once:
		o.err = err
		w.finish(batch)
		return
	case isMissingTable(err):
		w.repair(err)
	}
	for _, o := range batch {
		if o.attempts > 0 {
			o.notBefore = time.Now().Add(min(repeatMin<<min(o.attempts, 10), repeatMax))
		}
	}
	w.requeue(batch, err)
}

// repair creates tables that are missing.
func (w *worker) repair(err error) {
	s := w.session
	s.log.Warn("locker: tables are missing; creating them again", slog.String("error", err.Error()))
	ctx, cancel := context.WithTimeout(context.Background(), openTimeout)
	defer cancel()
	if err := w.link.check(ctx); err != nil {
		s.log.Warn("locker: tables could not be created", slog.String("error", err.Error()))
	}
	// Its statements were prepared for other tables.
	w.hangUp()
	s.dropOwn(errors.WithMessage(err, "the session's row is gone"))
}

// finish delivers the results of a batch.
func (w *worker) finish(batch []*op) {
	s := w.session
	s.mu.Lock()
	for _, o := range batch {
		o.answer.doubt = o.doubt && o.answer.outcome != granted
		if o.state == opAbandoned {
			s.followUpLocked(o)
		}
		o.state = opDone
	}
	s.mu.Unlock()
	for _, o := range batch {
		// Afterwards the caller may recycle the operation.
		o.done <- struct{}{}
	}
}

// followUpLocked undoes the effect of an operation whose caller has left, if it has or may have
// one.
func (s *session) followUpLocked(o *op) {
	granted := o.answer.outcome == granted
	if granted || o.doubt && (o.kind == opAcquire || o.acquire) {
		s.enqueueLocked(newOp(context.WithoutCancel(o.ctx), opRelease, o.req.claim))
	}
	if !granted && (o.kind == opAnnounce || o.kind == opAcquire) && (o.doubt || o.found) {
		s.enqueueLocked(newOp(context.WithoutCancel(o.ctx), opWithdraw, o.req.claim))
	}
}
