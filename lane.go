package locker

import (
	"cmp"
	"context"
	"database/sql"
	"log/slog"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/lib/pq/oid"
	"github.com/pkg/errors"
)

// lane is a queue of operations and the link that serves it. Its worker is the only
// one who uses the link: it takes whatever operations have queued up while the last
// statement ran and sends them as one.
type lane struct {
	session *session
	index   uint8
	wake    chan struct{} // capacity 1: there is work, for the first lane's worker while it has no link

	// Guarded by the session's mu.
	queues [opKinds][]*op
	chores []chore
	link   *link  // nil: none is open
	idling *link  // the worker reads ahead on it; a read deadline in the past ends that
	beats  uint32 // heartbeats of the link
	since  uint32 // second: the beats when its duty began
	holds  int    // at the last heartbeat

	// The worker's own; whoever loses the session stops trusted.
	trusted *time.Timer // ends the session when heartbeats do not succeed for too long
	next    opKind      // whose turn it is
	beat    time.Time   // when the next heartbeat is due
	pulse   *time.Timer // wakes the worker then
	stuck   map[int64]stuckKey
	batch   []*op          // under way; the next one is made in the same place
	taken   map[int64]bool // of take, likewise
	crowded int            // batches that were large, less those that were not
	busy    int            // operations since the last heartbeat
}

// chore is what a lane's worker does between two batches. Its error means that the
// link is gone.
type chore func(*link) error

// beginLocked gives the lane a link; first is that of the first lane.
func (ln *lane) beginLocked(l, first *link) {
	s := ln.session
	l.stall.cancel = func() bool { return s.cancelStalled(l) }
	ln.link, ln.chores = l, nil
	ln.beats, ln.since, ln.holds = 0, 0, 0
	ln.stuck, ln.crowded, ln.busy = map[int64]stuckKey{}, 0, 0
	ln.beat = time.Now()
	ln.pulse = time.AfterFunc(heartbeatInterval, ln.wakeUp)
	ln.trusted = time.AfterFunc(lossBound, func() {
		s.lose(first, errors.Errorf("no heartbeat succeeded for %v", lossBound))
	})
}

func (ln *lane) endLocked() {
	if ln.link == nil {
		return
	}
	ln.link, ln.chores = nil, nil
	ln.trusted.Stop()
	ln.wakeUpLocked()
}

func (ln *lane) wakeUp() {
	ln.session.mu.Lock()
	defer ln.session.mu.Unlock()
	ln.wakeUpLocked()
}

func (ln *lane) wakeUpLocked() {
	if ln.idling != nil {
		_ = ln.idling.socket.SetReadDeadline(time.Unix(1, 0)) // fails only on a connection that has ended
		ln.idling = nil
	}
	select {
	case ln.wake <- struct{}{}:
	default: // it has been told already
	}
}

func (ln *lane) choreLocked(c chore) {
	ln.chores = append(ln.chores, c)
	ln.wakeUpLocked()
}

// serve carries out operations, chores and heartbeats until the link fails, which it
// answers, or is not needed any more.
func (ln *lane) serve(l *link) error {
	defer ln.pulse.Stop()
	for {
		if err := ln.beatIfDue(l); err != nil {
			return err
		}
		batch, c, over := ln.take(l)
		if over {
			return nil
		}
		if len(batch) > 0 {
			if err := ln.execute(l, batch); err != nil {
				return err
			}
			clear(batch) // others' now, or nobody's
		}
		if c != nil { // only now nothing is under way
			if err := c(l); err != nil {
				return err
			}
		}
		if len(batch) > 0 {
			ln.gather(len(batch))
		} else if c == nil {
			if err := ln.idle(l); err != nil {
				return err
			}
		}
	}
}

// gather lets the callers that were just answered come back with their next
// operation, so that it goes into the next batch: it yields for as long as the
// queues grow. It sees whether a second lane is worth its while.
func (ln *lane) gather(batch int) {
	ln.busy += batch
	if batch >= crowd {
		ln.crowded = min(ln.crowded+1, crowdedFor)
	} else {
		ln.crowded = max(ln.crowded-1, 0)
	}
	if ln.index == 0 && ln.crowded == crowdedFor {
		ln.session.split()
	}
	for before := -1; ; {
		ln.session.mu.Lock()
		n := ln.queuedLocked()
		ln.session.mu.Unlock()
		if n == before || n >= maxBatch {
			return
		}
		before = n
		runtime.Gosched()
	}
}

func (ln *lane) queuedLocked() (n int) {
	for _, q := range ln.queues {
		n += len(q)
	}
	return n
}

// idle waits until there is work or the next heartbeat is due; it answers an
// error when the connection has ended.
func (ln *lane) idle(l *link) error {
	s := ln.session
	s.mu.Lock()
	if ln.link != l || ln.workLocked() || len(ln.chores) > 0 || ln.overLocked() || !time.Now().Before(ln.beat) {
		s.mu.Unlock()
		return nil
	}
	ln.idling = l
	s.mu.Unlock()

	err := l.socket.watch()

	s.mu.Lock()
	ln.idling = nil
	_ = l.socket.SetReadDeadline(time.Time{}) // fails only on a connection that has ended
	s.mu.Unlock()
	return errors.Wrap(err, "the connection ended")
}

// workLocked says whether an operation can be taken.
func (ln *lane) workLocked() bool {
	for _, q := range ln.queues {
		if slices.ContainsFunc(q, func(o *op) bool { return o.state == opQueued && !ln.session.movingLocked(o) }) {
			return true
		}
	}
	return false
}

// overLocked says whether the worker may leave: the session closes and nothing is
// left to do.
func (ln *lane) overLocked() bool {
	s := ln.session
	idle := ln.queuedLocked() == 0 && len(ln.chores) == 0
	return s.closing && idle && s.moving == 0 && (ln.index > 0 || s.second == nil)
}

// take answers the next batch: as many operations of one kind as there are, but
// only one for each key, since the statements could not tell two apart. The
// kinds take turns. What is to be repeated is taken alone, and before whatever else
// is of its kind and key. With the batch comes a chore that is to be done after it.
// When the lane's link has been ended, or is not needed any more, it is over.
func (ln *lane) take(l *link) (batch []*op, c chore, over bool) {
	s := ln.session
	batch = ln.batch[:0]
	s.mu.Lock()
	defer s.mu.Unlock()
	if ln.link != l {
		return nil, nil, true
	}
	if len(ln.chores) > 0 {
		c, ln.chores = ln.chores[0], ln.chores[1:]
	}
	for range opKinds {
		kind := ln.next
		ln.next = (ln.next + 1) % opKinds
		q := ln.queues[kind]
		if len(q) == 0 {
			continue
		}
		limit := maxBatch
		keys := ln.taken
		clear(keys)
		if kind == opRepeat {
			limit = 1
		} else {
			for _, o := range ln.queues[opRepeat] {
				keys[o.req.key] = keys[o.req.key] || o.kind == kind
			}
		}
		ln.queues[kind] = slices.DeleteFunc(q, func(o *op) bool {
			switch {
			case o.state == opAbandoned:
				return true
			case len(batch) == limit, kind != opLookup && keys[o.req.key], s.movingLocked(o):
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
	ln.batch = batch
	slices.SortFunc(batch, func(a, b *op) int {
		if a.kind == opLookup && b.kind == opLookup { // no keys yet
			return cmp.Or(cmp.Compare(a.pull.repo, b.pull.repo), cmp.Compare(a.pull.pr, b.pull.pr))
		}
		return cmp.Compare(a.req.key, b.req.key)
	})
	return batch, c, len(batch) == 0 && c == nil && ln.overLocked()
}

// execute carries out a batch. It answers an error only if the link is gone. If
// the statement fails, the operations are queued again to be repeated one by one,
// so that only the one at fault gets the error.
func (ln *lane) execute(l *link, batch []*op) error {
	s := ln.session
	if batch = ln.refuseStuck(l, batch); len(batch) == 0 {
		return nil
	}
	l.stall.begin()
	ctx := context.WithoutCancel(batch[0].ctx)
	err := ln.statement(ctx, l, batch)
	if l.stall.end() && err == nil {
		for _, o := range batch { // committed, but by the primary alone
			if o.kind == opAcquire || o.answer.outcome == granted {
				o.err = errStalled
			}
		}
	}
	if err == nil {
		ln.finish(l, batch, nil)
		return nil
	}
	if l.broken(err) {
		if batch[0].kind == opLookup { // harmless to repeat in the next session
			s.mu.Lock()
			ln.queues[opLookup] = slices.Concat(batch, ln.queues[opLookup])
			s.mu.Unlock()
		} else {
			ln.finish(l, batch, &joinedError{errUnavailable, err})
		}
		return err
	}
	alone := len(batch) == 1
	if err2 := ln.undo(ctx, l, batch); err2 != nil {
		ln.finish(l, batch, &joinedError{errUnavailable, err2})
		return err2
	}
	if alone {
		o := batch[0]
		if o.kind == opRelease && isLockTableFull(err) { // giving back made room
			err = ln.statement(ctx, l, batch)
		}
		if o.kind == opRelease && err != nil { // the key is free; the row still names the holder, so its successor waits the delay
			s.log.Warn("locker: released without clearing the holder", slog.Int64("key", o.req.key), slog.String("error", err.Error()))
			err = nil
		}
		err = statementError(err)
		if errors.Is(err, errRowLocked) {
			ln.stuck[o.req.key] = stuckKey{time.Now().Add(stuckPause), err}
		}
		ln.finish(l, batch, err)
		return nil
	}
	s.mu.Lock()
	lost := ln.link != l
	if !lost {
		ln.queues[opRepeat] = append(ln.queues[opRepeat], batch...)
	}
	s.mu.Unlock()
	if lost {
		ln.finish(l, batch, &joinedError{errUnavailable, err})
	}
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
func (ln *lane) refuseStuck(l *link, batch []*op) []*op {
	if len(ln.stuck) == 0 || batch[0].kind != opAnnounce && batch[0].kind != opAcquire {
		return batch
	}
	var rest []*op
	for _, o := range batch {
		stuck, ok := ln.stuck[o.req.key]
		switch {
		case ok && time.Now().Before(stuck.until):
			ln.finish(l, []*op{o}, stuck.err)
			continue
		case ok:
			delete(ln.stuck, o.req.key)
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
	cancel func() bool

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
	cancelled := w.cancel()
	close(over)
	if !cancelled { // no connection was to be had
		w.mu.Lock()
		defer w.mu.Unlock()
		w.running = true
		w.timer.Reset(time.Second)
	}
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

// undo frees the advisory locks that a failed statement may have taken, or
// should have freed: session-level locks survive a rollback.
func (ln *lane) undo(ctx context.Context, l *link, batch []*op) error {
	s := ln.session
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
	return l.free(ctx, keys)
}

// free gives back whatever the link holds of the keys.
func (l *link) free(ctx context.Context, keys []int64) error {
	_, err := l.giveBack.ExecContext(ctx, int64Array(keys))
	if err != nil && !l.broken(err) {
		// What was freed stays free. The notification may have found no room in the
		// lock table; what is free already is not notified again.
		_, err = l.giveBack.ExecContext(ctx, int64Array(keys))
	}
	return errors.Wrap(err, "locker: give keys back")
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

// finish hands out results, or err to all of the batch. It registers what the link
// now holds, and releases what was acquired for a caller that is gone.
func (ln *lane) finish(l *link, batch []*op, err error) {
	s := ln.session
	s.mu.Lock()
	alive := s.aliveLocked(l)
	for _, o := range batch {
		if err != nil {
			o.result = result{err: err}
		}
		switch {
		case o.kind == opRelease:
			if s.held[o.req.key].id == o.req.id { // not a successor's
				delete(s.held, o.req.key)
			}
			if errors.Is(o.err, errUnavailable) {
				o.err = errReleaseLost
			}
		case o.answer.outcome != granted:
			if o.kind == opAnnounce && o.state == opAbandoned && o.err == nil && alive {
				s.enqueueLocked(newOp(o.ctx, opWithdraw, o.req.claim))
			}
		case !alive:
			o.result = result{err: &joinedError{errUnavailable, errReleaseLost}}
		default:
			s.held[o.req.key] = hold{id: o.req.id, lane: ln.index, beat: ln.beats}
			if o.state == opAbandoned || o.err != nil {
				s.enqueueLocked(newOp(o.ctx, opRelease, o.req.claim))
			}
		}
		o.state = opDone
	}
	s.mu.Unlock()
	for _, o := range batch {
		o.done <- struct{}{} // and then it may be recycled
	}
}

func (ln *lane) beatIfDue(l *link) error {
	if time.Now().Before(ln.beat) {
		return nil
	}
	return ln.heartbeat(l)
}

// heartbeat proves that the lane's link lives, and finds the keys that have a newer
// claim. Trust in the session is anchored to the time at which it started.
func (ln *lane) heartbeat(l *link) error {
	s := ln.session
	start := time.Now()
	ln.beat = start.Add(heartbeatInterval)
	ln.pulse.Reset(heartbeatInterval)
	var settled []int64
	s.mu.Lock()
	ln.beats++
	keys, ids := newArray(oid.T_int8, ln.holds, 8), newArray(oid.T_uuid, ln.holds, len(uuid.UUID{}))
	for key, h := range s.held {
		if h.lane != ln.index {
			continue
		}
		keys.addInt64(key)
		ids.addUUID(h.id)
		if ln.index == 0 && h.beat+1 < ln.beats && !h.shared {
			settled = append(settled, key)
		}
	}
	ln.holds = keys.len()
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
	ln.trusted.Reset(lossBound - time.Since(start))
	for _, n := range all {
		s.hub.dispatch(n.key, n.ev)
	}
	if ln.index == 0 {
		s.park(settled)
	} else {
		s.reviewSecond()
	}
	return nil
}
