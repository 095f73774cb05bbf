package locker

import (
	"context"
	"database/sql"
	"log/slog"
	"slices"
	"time"

	"github.com/pkg/errors"
)

const (
	crowd      = 64   // a batch of so many operations is large
	crowdedFor = 16   // the lanes split the keys when so many more batches were large than not
	quiet      = 3000 // with fewer operations between two heartbeats the second lane gives its keys back

	parkFrom  = 512 // holds that have lasted on the first lane, above which they are parked
	parkUntil = 128 // holds on the second lane, below which it is not theirs alone any more

	restBeats = 3 // heartbeats without a duty, after which the second lane is closed

	widenPause = 10 * time.Second // after the second lane could not be opened, or its link was lost
)

// duty is what the second lane is for. It is opened when there is a duty for it, and
// closed when there is none and it holds nothing.
//
//	rest → claims → rest            while there is more to do than one connection gets done
//	rest or claims → park → rest    while so much is held that the first connection would be slow
//
// While holds are parked there the keys are not split.
//
// Every transaction of a connection pays for each advisory lock that the connection
// holds, 55 ms for a million. So holds that last are parked on the second lane,
// whose transactions are few.
type duty int

const (
	dutyRest   duty = iota // nothing new; what it holds is released there
	dutyClaims             // half of the keys
	dutyPark               // the holds that last
)

// widenLocked opens the second lane.
func (s *session) widenLocked() {
	first := s.lanes[0].link
	if first == nil || s.second != nil || s.closing || time.Now().Before(s.widenAfter) {
		return
	}
	ctx, abort := context.WithCancel(s.ctx)
	over := make(chan struct{})
	s.second, s.abort = over, abort
	go func() { // ends with the first lane's link, with close, or when the lane has no duty
		defer close(over)
		defer abort()
		err := s.runSecond(ctx, first)
		if err != nil {
			s.log.Warn("locker: third connection could not be opened", slog.String("error", err.Error()))
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.second, s.abort = nil, nil
		if err != nil {
			s.widenAfter = time.Now().Add(widenPause)
		}
		s.lanes[0].wakeUpLocked()
	}()
}

// runSecond is the second lane's worker. It answers why its link could not be opened.
func (s *session) runSecond(ctx context.Context, first *link) error {
	ln := s.lanes[1]
	l, err := s.openSecond(ctx, first)
	if err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	defer l.close()
	s.mu.Lock()
	begun := s.lanes[0].link == first && !s.closing
	if begun {
		ln.beginLocked(l, first)
	}
	s.mu.Unlock()
	if !begun {
		return nil
	}
	err = ln.serve(l)
	lost := err != nil && s.lose(first, err)
	s.mu.Lock()
	defer s.mu.Unlock()
	ln.endLocked()
	if lost { // and if somebody ends it whenever it is there, the first had better be alone
		s.widenAfter = time.Now().Add(widenPause)
	}
	return nil
}

// openSecond opens a link beside the first, and makes sure that both lead to the same
// server: what one of them holds has to bar the other.
func (s *session) openSecond(ctx context.Context, first *link) (*link, error) {
	l, err := openLink(ctx, s.dsn, s.serviceName, first.generation)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, l.kill)
	defer stop()
	limit := time.AfterFunc(openTimeout, l.kill)
	defer limit.Stop()
	l.number = first.number
	var same bool
	if err = l.setUp(); err == nil {
		err = l.conn.QueryRowContext(context.Background(), sqlSameServer, first.number, first.pid).Scan(&same)
	}
	if err == nil && !same {
		err = errors.New("locker: the third connection reached another server than the first")
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// awaitSecond returns when the second lane's worker has ended.
func (s *session) awaitSecond() {
	s.mu.Lock()
	over := s.second
	s.mu.Unlock()
	if over != nil {
		<-over
	}
}

// split lets the second lane have half of the keys. The first lane's worker calls it
// between two batches: it has none of them under way.
func (s *session) split() {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.lanes[1].link == nil:
		s.widenLocked()
	case s.duty == dutyRest:
		s.takeDutyLocked(dutyClaims)
	}
}

// takeDutyLocked gives the second lane another duty. The lane whose keys become the
// other's must not have an operation under way.
func (s *session) takeDutyLocked(d duty) {
	s.duty, s.lanes[1].since = d, s.lanes[1].beats
	s.rerouteLocked()
}

// reviewSecond is called by the second lane's worker at a heartbeat, when it has no
// operation under way.
func (s *session) reviewSecond() {
	s.mu.Lock()
	defer s.mu.Unlock()
	ln := s.lanes[1]
	calm := ln.busy < quiet && ln.beats > ln.since+1 // a whole interval of it
	ln.busy = 0
	switch {
	case s.duty == dutyClaims && calm:
		s.takeDutyLocked(dutyRest)
	case s.duty == dutyRest && calm && ln.holds == 0 && ln.beats > ln.since+restBeats && ln.queuedLocked() == 0 && len(ln.chores) == 0:
		ln.endLocked()
	}
}

// park has the second lane hold keys that the first lane has held for a while. Each
// is moved without a gap: the first lane exchanges its lock for one in share mode,
// the second takes one in share mode, too, and then the first lets go. Whoever wants
// the key, this library or the original, tries in exclusive mode, which both bar. If
// somebody waits for the key inside the server, no share mode is granted any more:
// then the key stays where it is.
func (s *session) park(settled []int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	second := s.lanes[1]
	move := func(l *link) error { return s.share(l, settled) }
	switch {
	case s.moving > 0:
	case len(settled) <= parkFrom:
		if s.duty == dutyPark && second.beats > second.since+1 && second.holds < parkUntil { // counted since
			s.takeDutyLocked(dutyRest)
		}
	case second.link == nil:
		s.widenLocked() // then with the next heartbeat
	case s.duty == dutyPark:
		s.lanes[0].choreLocked(move)
	default:
		second.choreLocked(func(*link) error { // between two batches of the lane
			s.mu.Lock()
			defer s.mu.Unlock()
			s.takeDutyLocked(dutyPark)
			s.lanes[0].choreLocked(move)
			return nil
		})
	}
}

// share is the first step, on the first lane.
func (s *session) share(l *link, settled []int64) error {
	var keys []int64
	s.mu.Lock()
	for len(settled) > 0 && len(keys) < maxBatch && s.duty == dutyPark && !s.closing {
		key := settled[0]
		settled = settled[1:]
		if h, ok := s.held[key]; ok && h.lane == 0 && !h.shared {
			h.moving = true
			s.held[key] = h
			keys = append(keys, key)
		}
	}
	s.moving += len(keys)
	s.mu.Unlock()
	if len(keys) == 0 {
		return nil
	}
	shared, err := answers(l.share, keys)
	if err != nil && l.broken(err) {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.aliveLocked(l) {
		return nil // nothing is held any more
	}
	keys = slices.DeleteFunc(keys, func(key int64) bool {
		h := s.held[key]
		h.shared = shared[key] || err != nil // in doubt: a release looks which it is
		s.held[key] = h
		stays := !shared[key] || err != nil
		if stays {
			s.arrivedLocked(key)
		}
		return stays
	})
	s.lanes[1].choreLocked(func(l *link) error { return s.takeOver(l, keys, settled) })
	return nil
}

// takeOver is the second step, on the second lane.
func (s *session) takeOver(l *link, keys, settled []int64) error {
	taken, err := answers(l.takeOver, keys)
	if err != nil {
		if l.broken(err) {
			return err
		}
		taken = nil
		if err := l.free(context.Background(), keys); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.aliveLocked(l) {
		return nil
	}
	keys = slices.DeleteFunc(keys, func(key int64) bool {
		if !taken[key] {
			s.arrivedLocked(key)
			return true
		}
		h := s.held[key]
		h.lane = 1
		s.held[key] = h
		return false
	})
	s.rerouteLocked()
	s.lanes[0].choreLocked(func(l *link) error { return s.letGo(l, keys, settled) })
	return nil
}

// letGo is the third step, on the first lane.
func (s *session) letGo(l *link, keys, settled []int64) error {
	_, err := answers(l.letGo, keys)
	if err != nil && !l.broken(err) {
		_, err = answers(l.letGo, keys) // what was let go of stays so
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.aliveLocked(l) {
		return nil
	}
	for _, key := range keys {
		s.arrivedLocked(key)
	}
	if len(settled) > 0 {
		s.lanes[0].choreLocked(func(l *link) error { return s.share(l, settled) })
	}
	return nil
}

// arrivedLocked ends the move of a key.
func (s *session) arrivedLocked(key int64) {
	h := s.held[key]
	h.moving = false
	s.held[key] = h
	s.moving--
	s.lanes[h.lane].wakeUpLocked() // its release may have waited
}

// movingLocked says whether an operation has to wait for the move of its key.
func (s *session) movingLocked(o *op) bool {
	return s.moving > 0 && o.kind == opRelease && s.held[o.req.key].moving
}

// answers asks a statement a yes or no for each key.
func answers(stmt *sql.Stmt, keys []int64) (map[int64]bool, error) {
	all := make(map[int64]bool, len(keys))
	var key int64
	var yes bool
	err := each(context.Background(), stmt, []any{int64Array(keys)}, []any{&key, &yes}, func() { all[key] = yes })
	return all, err
}
