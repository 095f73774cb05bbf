package locker

import (
	"context"
	"database/sql"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

// lookAfterRows queues the checks that follow a heartbeat: whether NOTIFY works again, some rows of
// holds, holds and claims that the rows name wrongly, and at times dead sessions. It queues nothing
// if there are no holds, NOTIFY works and no reply was lost.
func (s *session) lookAfterRows(ref sessionRef, beats int) {
	holds, _ := s.hub.counts()
	s.mu.Lock()
	mute, queued := s.mute, s.checking == ref
	unsure := !s.unsure.IsZero() && (time.Since(s.unsure) < unsureFor || beats%sweepBeats == 0)
	wanted := !queued && (holds > 0 || mute || unsure)
	if wanted {
		s.checking = ref
	}
	s.mu.Unlock()
	if !wanted {
		return
	}
	s.enqueueCheck(ref, func(ctx context.Context, l *link) (err error) {
		defer func() {
			// After any other error the worker repeats this check, so no other one is needed.
			if err == nil || badInput(err) {
				s.mu.Lock()
				s.checking = sessionRef{}
				s.mu.Unlock()
			}
		}()
		if mute && l.exec(ctx, sqlNotify, `{"kind":"`+kindCheck+`"}`) == nil {
			s.mu.Lock()
			s.mute = false
			s.mu.Unlock()
			s.log.Info("locker: NOTIFY works again")
		}
		if _, err := s.checkRows(ctx, l, ref, mute); err != nil {
			return err
		}
		if unsure || beats%sweepBeats == 0 {
			if err := s.releaseForgotten(ctx, l, ref); err != nil {
				return err
			}
		}
		if beats%sweepBeats == 0 {
			return s.sweep(ctx, l, ref)
		}
		return nil
	})
}

// A statement may be carried out after its reply was lost: the release of a claim that has left may
// come before its acquire. For unsureFor each heartbeat looks for such a hold, and then every
// sweepBeats-th as long as the session lives.
const unsureFor = 30 * time.Second

// reconcile compares rows and holds in both directions after a reconnect, and then reports the
// number of holds that were kept and lost. The parameter lost is the number of those that are lost
// already. For a new session it only looks for dead sessions.
func (s *session) reconcile(ref sessionRef, suspended time.Time, lost int) {
	after := time.Since(suspended)
	s.hub.broadcast(event{kind: evReleased})
	s.enqueueCheck(ref, func(ctx context.Context, l *link) error {
		if suspended.IsZero() {
			return s.sweep(ctx, l, ref)
		}
		away, err := s.checkRows(ctx, l, ref, true)
		// If the rest fails, a repeat does not find these any longer.
		lost += away
		if err == nil {
			err = s.releaseForgotten(ctx, l, ref)
		}
		if err == nil {
			holds, _ := s.hub.counts()
			s.trust.reconnected(after, holds, lost)
		}
		return err
	})
}

// Each heartbeat checks the rows of this many holds.
const maxChecked = 1_000

// checkRows checks the rows of holds: maxChecked of them, or all. A hold that its row no longer
// names is lost. A holder that a claim has asked to stop is notified. It returns the number of
// holds that are lost.
func (s *session) checkRows(ctx context.Context, l *link, ref sessionRef, all bool) (lost int, err error) {
	cursor := &s.cursor
	if all {
		cursor = new(int)
	}
	for {
		claims, more := s.hub.held(cursor, maxChecked)
		keys := column(claims, func(c claim) int64 { return c.key })
		ids := column(claims, func(c claim) uuid.UUID { return c.id })
		type found struct {
			key int64
			ev  event
		}
		var alive, same bool
		var news []found
		var key, number sql.NullInt64
		var id, newest uuid.NullUUID
		var text sql.NullString
		first := true
		err := l.each(ctx, sqlCheck, []any{keys, ids, ref.id, ref.lock}, []any{&same, &key, &id, &number, &newest, &text}, func() {
			switch {
			case first:
				alive, first = same, false
			case !same:
				news = append(news, found{key.Int64, event{kind: evGone, hold: id.UUID,
					cause: errors.New("the row of the key does not name the hold any longer")}})
			default:
				news = append(news, found{key.Int64, event{kind: evNewest, hold: id.UUID, from: standing{number.Int64, newest.UUID}, claim: decodeClaim(text)}})
			}
		})
		if err != nil {
			return lost, err
		}
		// Another check follows the next connection.
		if !s.trust.connectedAs(ref) {
			return lost, nil
		}
		if !alive {
			// The fault may be with either connection, so both are opened again.
			s.suspect(ref, errElsewhere)
			return lost, errElsewhere
		}
		var gone []claim
		for _, n := range news {
			if n.ev.kind == evGone {
				gone = append(gone, claim{key: n.key, id: n.ev.hold})
			}
			s.hub.dispatch(n.key, n.ev)
		}
		lost += len(gone)
		// Such a hold is not released, not even when its function has returned.
		if s.conf.originalReplicas {
			s.unlockKeys(gone)
		}
		if !all || !more {
			return lost, nil
		}
	}
}

// suspect closes the session's connection, because it does not serve its purpose.
func (s *session) suspect(ref sessionRef, cause error) {
	if s.trust.connectedAs(ref) {
		s.dropOwn(cause)
	}
}

// releaseForgotten releases holds that rows name for the session, but that no lock of it has: the
// server has forgotten a release in a crash, or has carried out an acquire after the release of its
// claim. It withdraws claims of the session that no lock of it makes any longer.
func (s *session) releaseForgotten(ctx context.Context, l *link, ref sessionRef) error {
	var key int64
	var id uuid.UUID
	var held bool
	var forgotten, gone []claim
	err := l.each(ctx, sqlHolds, []any{ref.id}, []any{&key, &id, &held}, func() {
		switch c := (claim{key: key, id: id}); {
		case s.hub.knows(key, id):
		case held:
			forgotten = append(forgotten, c)
		default:
			gone = append(gone, c)
		}
	})
	// The holders of a session that was lost meanwhile release their keys themselves.
	if !s.trust.connectedAs(ref) {
		return err
	}
	for _, c := range forgotten {
		s.release(context.Background(), c)
	}
	for _, c := range gone {
		s.withdraw(c)
	}
	return err
}

// sweep deletes the rows of sessions that have no holds, once this process has watched them being
// dead for their timeout.
func (s *session) sweep(ctx context.Context, l *link, ref sessionRef) error {
	var lock int64
	var timeout float64
	var expired []int64
	err := l.each(ctx, sqlDeadSessions, []any{ref.lock}, []any{&lock, &timeout}, func() {
		s.watches.dead(lock, seconds(timeout))
		if s.watches.expired(lock) {
			expired = append(expired, lock)
		}
	})
	if err == nil && len(expired) > 0 {
		err = l.exec(ctx, sqlSweep, ref.lock, int64Array(expired))
	}
	return err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }
