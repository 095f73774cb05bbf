package locker

import (
	"context"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

// keepListener keeps the connection on which notifications arrive. Only speed depends on it. It
// ends with close.
func (s *session) keepListener() {
	first, down := true, false
	way := &way{ask: s.dsn}
	s.keep(kept{
		name:    "listener",
		wake:    s.listen,
		way:     way,
		allowed: s.isAdmitted,
		open: func() (*line, error) {
			l, err := openLine(s.ctx, way.dsn, s.conf.sessionTimeout, 0, s.heard)
			if err != nil {
				return nil, err
			}
			defer context.AfterFunc(s.ctx, l.end)()
			if err := l.exec(openTimeout, sqlListen); err != nil {
				l.close()
				return nil, errors.Wrap(err, "locker: LISTEN")
			}
			s.mu.Lock()
			s.listens, s.deaf = true, nil
			s.mu.Unlock()
			if down {
				s.log.Info("locker: listening again")
			}
			if !first {
				s.catchUp()
			}
			first, down = false, false
			return l, nil
		},
		beat: s.beatListener,
		ended: func(_ *line, err error) {
			s.mu.Lock()
			s.listens = false
			s.mu.Unlock()
			if s.ctx.Err() == nil && err != errIdle {
				down = true
				s.log.Warn("locker: listener lost: notifications arrive late until it is back", slog.String("cause", err.Error()))
			}
		},
		failed: func(err error, _ time.Duration) {
			down = true
			s.mu.Lock()
			defer s.mu.Unlock()
			s.deaf = err
		},
	})
}

// beatListener checks that the channel is registered. Notifications arrive on another goroutine of
// the connection.
func (s *session) beatListener(l *line, _ time.Time) error {
	err := l.exec(max(heartbeatDeadline(s.conf.sessionTimeout), time.Second), sqlListening)
	if sqlState(err) == "22012" {
		return errors.New("the channel is not registered in this server session any longer")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err == nil && s.resting && s.queuedLocked() == 0 {
		err = errIdle
	}
	return err
}

// heard processes a payload that the listener has received.
func (s *session) heard(payload string) {
	m, err := decodeMessage(payload)
	if err != nil {
		s.log.Debug("locker: foreign notification ignored", slog.String("error", err.Error()))
		return
	}
	switch m.Kind {
	case kindCheck:
		s.mu.Lock()
		if arrived := s.proofs[m.ID]; arrived != nil {
			delete(s.proofs, m.ID)
			close(arrived)
		}
		s.mu.Unlock()
	case kindClaim:
		s.hub.dispatch(m.LockKey, m.claimed())
	case kindReleased:
		s.hub.dispatch(m.LockKey, event{kind: evReleased})
	case kindManual:
		s.hub.dispatch(m.LockKey, event{kind: evManual, message: m.Event})
	}
}

// roundTrip calls send, which sends a notification to this process, repeatedly until the
// notification arrives, or ctx or stop ends: the listener may still have to connect. It reports
// whether the notification has arrived.
func (s *session) roundTrip(ctx context.Context, stop <-chan struct{}, send func(payload string) error) (arrived bool, err error) {
	nonce, heard := uuid.New(), make(chan struct{})
	s.mu.Lock()
	s.proofs[nonce] = heard
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.proofs, nonce)
		s.mu.Unlock()
	}()
	for pause := 5 * time.Millisecond; ; pause *= 2 {
		if err := send(`{"kind":"` + kindCheck + `","id":"` + nonce.String() + `"}`); err != nil {
			return false, err
		}
		select {
		case <-heard:
			return true, nil
		case <-ctx.Done():
			return false, nil
		case <-stop:
			return false, nil
		case <-time.After(min(pause, proofTimeout/12)):
		}
	}
}

// proveNotify returns nil if notifications that the workers' connections send arrive at the
// listener, or if NOTIFY itself fails: then the session works without it.
func (s *session) proveNotify(way *way) error {
	l, err := openLink(s.ctx, way.dsn, nil, s.conf.sessionTimeout)
	if err != nil {
		return err
	}
	defer l.close()
	bounded, cancel := context.WithTimeout(s.ctx, proofTimeout)
	defer cancel()
	arrived, err := s.roundTrip(bounded, nil, func(payload string) error {
		ctx, cancel := context.WithTimeout(context.Background(), statementTimeout)
		defer cancel()
		return l.exec(ctx, sqlNotify, payload)
	})
	switch {
	case arrived:
		return nil
	case s.ctx.Err() != nil:
		return ErrProviderClosed
	case err != nil && broken(err):
		return poolerError(errors.Wrap(err, "locker: prove that NOTIFY arrives"))
	case err != nil:
		s.muted(err)
		return nil
	}
	s.mu.Lock()
	deaf := s.deaf
	s.mu.Unlock()
	if deaf != nil {
		return errors.WithMessage(deaf, "locker: listen for notifications")
	}
	return refused("a NOTIFY to this process did not arrive within %v: a proxy in transaction-pooling mode is in between; connect to PostgreSQL directly or to a pool in session mode", proofTimeout)
}

// poolerError marks the errors of prepared statements that a backend does not have although they
// were prepared, or has although they were not.
func poolerError(err error) error {
	if state := sqlState(err); state == "26000" || state == "42P05" {
		return refusedError{errors.WithMessage(err, errPooler.Error())}
	}
	return err
}

// muted makes statements work without NOTIFY until one succeeds again.
func (s *session) muted(err error) {
	s.mu.Lock()
	was := s.mute
	s.mute = true
	s.mu.Unlock()
	if !was {
		s.log.Warn("locker: NOTIFY fails: holders and waiters learn from the rows", slog.String("error", err.Error()))
	}
}

// catchUp makes up for notifications that may have been missed: waiters try again, and all rows of
// holds are checked.
func (s *session) catchUp() {
	s.hub.broadcast(event{kind: evReleased})
	ref, connected := s.trust.current()
	if connected {
		s.enqueueCheck(ref, func(ctx context.Context, l *link) error {
			_, err := s.checkRows(ctx, l, ref, true)
			return err
		})
	}
}
