package locker

import (
	"fmt"

	"github.com/google/uuid"
	"github.com/pkg/errors"
)

// Next to replicas of the original library a hold has the key's own session-level
// advisory lock as well, on the session's connection: that is all that the original
// looks at. This file is what WithOriginalReplicas adds.

// keyLocks are the keys whose advisory locks a connection has, and the claims that
// they are for. They are guarded by the session's mu.
type keyLocks map[int64]uuid.UUID

// lockKeys takes the keys' advisory locks for claims that are about to acquire, and
// notes which it has got.
func (s *session) lockKeys(batch []*op) {
	s.mu.Lock()
	l := s.own
	s.mu.Unlock()
	for _, o := range batch {
		o.keyLocked = l != nil && s.lockKey(l, o.req.claim) == nil
	}
}

func (s *session) lockKey(l *line, c claim) error {
	s.mu.Lock()
	_, has := s.keys[c.key] // an advisory lock could be taken twice
	s.mu.Unlock()
	if has {
		return errors.New("locker: another lock of this process holds the key")
	}
	err := l.exec(heartbeatDeadline(s.conf.sessionTimeout), fmt.Sprintf(sqlKeyLock, c.key))
	if err == nil {
		s.mu.Lock()
		s.keys[c.key] = c.id
		s.mu.Unlock()
	}
	return err
}

// unlockKeys gives back the advisory locks of claims that were not granted, or that
// were released.
func (s *session) unlockKeys(batch []*op) {
	for _, o := range batch {
		if o.answer.outcome == granted {
			continue
		}
		s.mu.Lock()
		l, has := s.own, s.keys[o.req.key] == o.req.id
		if has {
			delete(s.keys, o.req.key)
		}
		s.mu.Unlock()
		if has && l != nil {
			_ = l.exec(heartbeatDeadline(s.conf.sessionTimeout), fmt.Sprintf(sqlKeyUnlock, o.req.key)) // it fails only with the connection
		}
	}
}

// relockKeys takes the advisory locks of all holds on a new connection. A hold whose
// key a replica of the original has taken meanwhile is lost.
func (s *session) relockKeys(l *line) {
	s.mu.Lock()
	s.keys = keyLocks{}
	s.mu.Unlock()
	for cursor, more := 0, true; more; {
		var claims []claim
		claims, more = s.hub.held(&cursor, maxChecked)
		for _, c := range claims {
			if err := s.lockKey(l, c); err != nil {
				s.hub.dispatch(c.key, event{kind: evGone, from: standing{id: c.id},
					cause: errors.WithMessage(err, "the key's advisory lock was taken while the session was suspended")})
			}
		}
	}
}
