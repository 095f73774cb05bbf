package locker

import (
	"context"
	"database/sql"
	"encoding/json"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/pkg/errors"
)

// Holder is one key that is held or waited for, as the database knows it.
type Holder struct {
	Key         int64
	Repo        string // "" if the key is not one of LockKey's
	PullRequest uint

	// The hold. Since is zero if nobody holds, and Event, Host and PID are then
	// empty.
	Event string
	Host  string
	PID   int
	Since time.Time
	Token int64 // of the hold, or of the last one if nobody holds
	// Alive says whether the hold's session lives. If not, the holder died
	// without releasing, and the next Lock takes over after the lock delay.
	Alive bool

	// The newest claim, which may be the holder's own.
	NewestEvent string
	NewestHost  string
	NewestPID   int
	NewestAt    time.Time
	// Waiting says whether the newest claim waits for the key. Older claims never
	// wait for long: they are turned away.
	Waiting bool
}

const sqlHolders = `
SELECT lock_key, coalesce(repo, ''), coalesce(pull_request, 0),
    coalesce(holder_event, ''), coalesce(holder_host, ''), coalesce(holder_pid, 0), held_since, token, alive,
    newest_event, newest_host, newest_pid, newest_at, waiting
FROM env_lock_overview ORDER BY repo, pull_request, lock_key`

// Holders answers who holds and who waits, in the whole database, not only this
// provider's: what the view env_lock_overview shows. It uses a connection of its
// own for as long as it takes; calls wait for each other.
func (plp *PostgresLockProvider) Holders(ctx context.Context) ([]Holder, error) {
	var all []Holder
	err := plp.operate(ctx, func(ctx context.Context, db *sql.DB) error {
		rows, err := db.QueryContext(ctx, sqlHolders)
		if err != nil {
			return err
		}
		defer func() { _ = rows.Close() }() // its error is that of Err
		for rows.Next() {
			var h Holder
			var since, newest sql.NullTime
			if err := rows.Scan(&h.Key, &h.Repo, &h.PullRequest, &h.Event, &h.Host, &h.PID, &since, &h.Token, &h.Alive,
				&h.NewestEvent, &h.NewestHost, &h.NewestPID, &newest, &h.Waiting); err != nil {
				return err
			}
			h.Since, h.NewestAt = since.Time, newest.Time
			all = append(all, h)
		}
		return rows.Err()
	})
	return all, errors.Wrap(err, "locker: list holders")
}

// Stop asks the holder of a repo's pull request to stop, whichever process it is
// in. The reason reaches it as NotificationPayload.Message and in the cause, which
// matches ErrStopRequested; like every notification it is followed by revocation
// after the preemption timeout. It answers whether anybody held the lock. A new
// claim may follow at once: Stop bars nobody.
func (plp *PostgresLockProvider) Stop(ctx context.Context, repo string, pr uint, reason string) (asked bool, err error) {
	if plp.session == nil {
		return false, errProviderZero
	}
	if err := checkRepo(repo, pr); err != nil {
		return false, err
	}
	err = plp.operate(ctx, func(ctx context.Context, db *sql.DB) error {
		var key int64
		err := db.QueryRowContext(ctx, `SELECT lock_key FROM env_lock_overview WHERE repo = $1 AND pull_request = $2 AND alive`, repo, int64(pr)).Scan(&key)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		if err != nil {
			return err
		}
		var payload strings.Builder
		encoder := json.NewEncoder(&payload)
		encoder.SetEscapeHTML(false) // cleanEvent reckons with < as one byte
		if err := encoder.Encode(message{LockKey: key, Event: cleanEvent(reason)}); err != nil {
			return err
		}
		asked = true
		_, err = db.ExecContext(ctx, `SELECT pg_notify($1, $2)`, notifyChannel, payload.String())
		return err
	})
	return asked && err == nil, errors.Wrapf(err, "locker: stop the holder of %q#%d", repo, pr)
}

// operate lends an operator's call a connection.
func (plp *PostgresLockProvider) operate(ctx context.Context, use func(ctx context.Context, db *sql.DB) error) error {
	if plp.session == nil {
		return errProviderZero
	}
	if err := checkUse(ctx, plp.session.hub); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(plp.session.ctx, cancel) // Close ends it
	defer stop()
	err := plp.session.briefly(ctx, use)
	if e := pq.As(err); e != nil && e.Code == "42P01" {
		return errors.WithMessage(err, "the schema is not complete: it is made on the first Lock, or by SchemaSQL")
	}
	return err
}

// Stats is a provider's state at one moment.
type Stats struct {
	Queued    int  // operations that wait for the session
	Held      int  // keys that the session holds
	Connected bool // a session is open
}

// Stats answers the provider's state, for metrics. It asks nobody and is cheap.
func (plp *PostgresLockProvider) Stats() Stats {
	if plp.session == nil {
		return Stats{}
	}
	s := plp.session
	s.mu.Lock()
	defer s.mu.Unlock()
	return Stats{Queued: s.queuedLocked(), Held: len(s.held), Connected: s.lanes[0].link != nil}
}
