package locker

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/lib/pq/oid"
	"github.com/pkg/errors"
)

// Next to replicas of the original library a hold has the key's own session-level
// advisory lock as well, on the session's connection: that is all that the original
// looks at. This file is what WithOriginalReplicas adds.

// keyLocks are the advisory locks of keys that the session's connection has. An
// advisory lock can be taken twice by one connection, so owners decides between the
// locks of one provider.
type keyLocks struct {
	mu     sync.Mutex // guards everything below; held while a statement runs on line
	line   *line      // the session's connection, from before the session is connected
	ref    sessionRef // the session on line
	owners map[int64]uuid.UUID
	stale  []int64 // the session locks of connections before line, which may still have what owners says
}

// acquireWithKeyLocks is acquireKeys for claims that need the advisory locks of their
// keys, too.
func (w *worker) acquireWithKeyLocks(ctx context.Context, l *link, ref sessionRef, batch []*op, quiet bool) error {
	s := w.session
	if err := s.lockKeys(ctx, l, ref, batch); err != nil {
		return err
	}
	err := w.acquireKeys(ctx, l, ref, batch, quiet)
	s.keepKeys(batch, err)
	return err
}

// lockKeys takes the advisory locks of those keys that the batch may get, and notes
// with each operation whether its claim has it. The locks of keys that others hold,
// or whose sessions are suspended, are not touched: their holders need them when they
// reconnect.
func (s *session) lockKeys(ctx context.Context, l *link, ref sessionRef, batch []*op) error {
	keys, ids := claimArrays(claimsOf(batch))
	var dead array
	for i, o := range batch {
		o.keyLocked = false
		if s.watches.over(o.req.blocker) {
			dead.addAt(i, oid.T_int8).addInt64(o.req.blocker)
		}
	}
	var key int64
	var free []*op
	if err := l.each(ctx, sqlTakeable, []any{keys, ids, dead}, []any{&key}, func() {
		free = append(free, find(batch, key))
	}); err != nil {
		return err
	}

	k := &s.keys
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.line == nil || k.ref != ref {
		return nil // the session is connecting: the statement takes nothing
	}
	var wanted []int64
	for _, o := range free {
		if _, has := k.owners[o.req.key]; !has {
			wanted = append(wanted, o.req.key)
			k.owners[o.req.key] = o.req.id
		}
	}
	refused, err := s.tryKeysLocked(wanted)
	if err != nil {
		refused = wanted
	}
	for _, key := range refused {
		delete(k.owners, key)
	}
	for _, o := range free {
		o.keyLocked = k.owners[o.req.key] == o.req.id
	}
	if err != nil && broken(err) {
		return nil // the session is suspended: the statement takes nothing
	}
	return err
}

// keepKeys gives back the advisory locks of claims that were not granted.
func (s *session) keepKeys(batch []*op, err error) {
	k := &s.keys
	k.mu.Lock()
	defer k.mu.Unlock()
	var back []claim
	for _, o := range batch {
		granted := err == nil && o.answer.outcome == granted
		owns := k.owners[o.req.key] == o.req.id
		switch {
		case owns && !granted:
			back = append(back, o.req.claim)
		case granted && !owns:
			// The session has reconnected meanwhile, and the key was refused. If that goes
			// on, the claim is released.
			o.answer, o.doubt = answer{outcome: again}, true
		}
	}
	s.unlockKeysLocked(back)
}

// unlockKeys gives back the advisory locks of claims that are about to be released. The
// row follows: the claim that is notified then finds the key free.
func (s *session) unlockKeys(claims []claim) {
	s.keys.mu.Lock()
	defer s.keys.mu.Unlock()
	s.unlockKeysLocked(claims)
}

func (s *session) unlockKeysLocked(claims []claim) {
	k := &s.keys
	var back []int64
	for _, c := range claims {
		if owner, has := k.owners[c.key]; has && owner == c.id {
			back = append(back, c.key)
			delete(k.owners, c.key)
		}
	}
	s.giveBackLocked(back)
}

func (s *session) giveBackLocked(keys []int64) {
	if len(keys) == 0 {
		return
	}
	if err := s.keys.line.exec(s.keyDeadline(), fmt.Sprintf(sqlKeyUnlock, numbers(keys))); err != nil {
		_ = s.keys.line.conn.Close() // with the connection its locks end; it fails only if it has ended
	}
}

// relockKeys takes the advisory locks of all holds on a new connection. A hold whose
// key is refused, because a replica of the original has it now, is lost. It returns
// the number of those.
func (s *session) relockKeys(l *line, ref sessionRef) (lost int, err error) {
	k := &s.keys
	k.mu.Lock()
	if k.ref.generation != ref.generation {
		k.owners, k.stale = map[int64]uuid.UUID{}, nil
	} else {
		k.stale = append(k.stale, k.ref.lock)
	}
	k.line, k.ref = l, ref
	var gone []claim
	if len(k.owners) > 0 {
		gone, err = s.relockKeysLocked()
	}
	k.mu.Unlock()
	for _, c := range gone {
		s.hub.dispatch(c.key, event{kind: evGone, from: standing{id: c.id},
			cause: errors.New("the key's advisory lock was taken while the session was suspended")})
	}
	return len(gone), err
}

func (s *session) relockKeysLocked() (gone []claim, err error) {
	k := &s.keys
	// The server may not have noticed yet that the last connection has ended. Until it
	// does, that has the locks.
	if err := k.line.exec(s.keyDeadline(), fmt.Sprintf(sqlSessionKill, numbers(k.stale))); err != nil {
		return nil, errors.Wrap(err, "locker: end the session's last connection")
	}
	if err := k.line.exec(s.keyDeadline(), fmt.Sprintf(sqlSessionDead, numbers(k.stale))); err != nil {
		return nil, errors.Wrap(err, "locker: wait for the end of the session's last connection")
	}
	k.stale = nil
	keys := make([]int64, 0, len(k.owners))
	for key := range k.owners {
		keys = append(keys, key)
	}
	for len(keys) > 0 {
		n := min(len(keys), maxChecked)
		refused, err := s.tryKeysLocked(keys[:n])
		if err != nil {
			return gone, errors.Wrap(err, "locker: take the keys' advisory locks")
		}
		for _, key := range refused {
			gone = append(gone, claim{key: key, id: k.owners[key]})
			delete(k.owners, key)
		}
		keys = keys[n:]
	}
	return gone, nil
}

// tryKeysLocked takes advisory locks, and returns those that others have. The
// connection returns no rows, so they are in the text of an error.
func (s *session) tryKeysLocked(keys []int64) (refused []int64, err error) {
	if len(keys) == 0 {
		return nil, nil
	}
	err = s.keys.line.exec(s.keyDeadline(), fmt.Sprintf(sqlKeyLock, numbers(keys)))
	if err == nil {
		return nil, nil
	}
	if e := pq.As(err); e != nil {
		if found := refusedKeys.FindStringSubmatch(e.Message); found != nil {
			for _, text := range strings.Split(found[1], ",") {
				key, err := strconv.ParseInt(text, 10, 64)
				if err != nil {
					return nil, errors.Wrap(err, "locker: read refused keys")
				}
				refused = append(refused, key)
			}
			return refused, nil
		}
	}
	s.giveBackLocked(keys) // how many of them it took is not known
	return nil, err
}

var refusedKeys = regexp.MustCompile(`locks that others have: ([-0-9,]+);`)

// keyDeadline is how long a statement for keys may take on the session's connection.
func (s *session) keyDeadline() time.Duration {
	return min(heartbeatDeadline(s.conf.sessionTimeout), statementTimeout)
}

// numbers writes an array for a statement that takes no arguments.
func numbers(all []int64) string {
	var b strings.Builder
	for i, n := range all {
		if i > 0 {
			b.WriteByte(',')
		}
		b.WriteString(strconv.FormatInt(n, 10))
	}
	return b.String()
}
