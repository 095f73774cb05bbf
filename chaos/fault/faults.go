package fault

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

// Fault is a fault that happens once or again and again.
type Fault struct {
	Name    string
	Victims int           // how many workers it hits, or All
	Session bool          // it may keep the victims' sessions out of contact with the server
	Cut     bool          // it does so from its first to its last moment
	Slow    bool          // it breaks no contact, but reconnecting and looking things up may take as long as it lasts
	Hold    time.Duration // until it is healed
	Settle  time.Duration // until the next one
	Alone   bool          // whether it must not be mixed with others
	// Inject begins the fault, and heal ends it.
	Inject func(ctx context.Context, s Scene) (heal func() error, err error)
}

// All means all workers.
const All = -1

// Scene is the context of a fault.
type Scene struct {
	*World
	Fault   string
	Victims []*Worker
	Rand    *rand.Rand
}

// ids numbers the instances of faults.
var ids atomic.Int64

// Run injects a fault, waits and heals it. It returns when the server accepts writes again. It
// returns an error if the fault could not be injected or healed, which happens when faults are
// mixed.
func (f Fault) Run(ctx context.Context, w *World, victims []*Worker, r *rand.Rand) error {
	// Each victim holds a key when the fault begins, and a lock of another worker waits for it
	// without an announced claim.
	for _, v := range victims {
		_ = w.Command(v, fmt.Sprintf("hold %d", w.private(v)))
	}
	if len(victims) > 0 {
		pause(ctx, time.Second)
	}
	others := slices.DeleteFunc(w.Workers(), func(o *Worker) bool { return slices.Contains(victims, o) })
	if len(others) == 0 {
		others = w.Workers()
	}
	for _, v := range victims {
		_ = w.Command(others[r.IntN(len(others))], fmt.Sprintf("wait %d", w.private(v)))
	}
	id := int(ids.Add(1))
	w.Record(oracle.Event{At: oracle.Now(), Kind: oracle.Inject, ID: id, Fault: f.Name, Victims: w.Names(victims), Session: f.Session, Cut: f.Cut, Slow: f.Slow})
	heal, err := f.Inject(ctx, Scene{w, f.Name, victims, r})
	if err == nil {
		pause(ctx, f.Hold)
	}
	if heal != nil {
		err = errors.Join(err, heal())
	}
	w.await(ctx, 20*time.Second)
	healed := oracle.Event{At: oracle.Now(), Kind: oracle.Heal, ID: id}
	if err != nil {
		healed.Class, healed.Text = oracle.ClassFailed, err.Error()
	}
	w.Record(healed)
	return err
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// again calls do at an interval for some time.
func again(ctx context.Context, every, length time.Duration, do func()) {
	for end := time.Now().Add(length); time.Now().Before(end) && ctx.Err() == nil; {
		do()
		pause(ctx, every)
	}
}

// Faults returns all faults, except the loss of a primary, which needs a separate world. With a
// session timeout of 10 s no hold may be lost because of a fault that keeps its process out of
// contact for 3 s.
func Faults() []Fault {
	const s = time.Second
	return []Fault{
		{Name: "none", Hold: 15 * s, Alone: true, Inject: func(context.Context, Scene) (func() error, error) { return nil, nil }},

		// Processes.
		{Name: "SIGKILL of a worker", Victims: 1, Hold: 3 * s, Settle: 14 * s, Inject: killWorker},
		{Name: "SIGSTOP of a worker for 3 s", Victims: 1, Hold: 3 * s, Settle: 4 * s, Inject: freezeWorker},
		{Name: "SIGSTOP of a worker for 12 s", Victims: 1, Hold: 12 * s, Settle: 6 * s, Inject: freezeWorker},
		{Name: "SIGSTOP of a worker for 20 s", Victims: 1, Hold: 20 * s, Settle: 6 * s, Inject: freezeWorker},
		// This is long enough for the server to end the worker's connection and for a successor to
		// take over: two workers believe that they hold.
		{Name: "SIGSTOP of a worker for 40 s", Victims: 1, Hold: 40 * s, Settle: 6 * s, Inject: freezeWorker},
		{Name: "wall clock of a worker 1 h off", Victims: 1, Hold: 30 * s, Settle: 8 * s, Alone: true, Inject: skew},
		{Name: "1000 claimants on one key", Victims: All, Hold: 10 * s, Settle: 4 * s, Alone: true, Inject: burst},

		// Connections.
		{Name: "session terminated", Victims: 1, Session: true, Settle: 5 * s, Inject: terminate(Session)},
		{Name: "listener terminated", Victims: 1, Settle: 4 * s, Inject: terminate(Listener)},
		{Name: "statements terminated", Victims: 1, Settle: 4 * s, Inject: terminate(Statements)},
		{Name: "all connections terminated", Victims: All, Session: true, Settle: 6 * s, Inject: terminate()},
		{Name: "connections cut every 300 ms for 30 s", Victims: 1, Session: true, Settle: 6 * s, Inject: flap},
		{Name: "connections cut", Victims: All, Session: true, Settle: 3 * s, Inject: cut},
		{Name: "random backends terminated", Victims: 2, Session: true, Settle: 5 * s, Inject: terminateRandom},
		{Name: "random statements cancelled", Victims: All, Session: true, Settle: 4 * s, Inject: cancelStatements},
		{Name: "connections cut as statements are answered", Victims: 2, Slow: true, Hold: 8 * s, Settle: 4 * s,
			Inject: change(func(s *Shape) { s.Odds, s.Cut = 4, true }, Statements)},
		{Name: "connections cut as the session is answered", Victims: 2, Session: true, Hold: 8 * s, Settle: 4 * s,
			Inject: change(func(s *Shape) { s.Odds, s.Cut = 3, true }, Session, Listener)},
		{Name: "backend swapped under the session", Victims: 1, Session: true, Settle: 6 * s, Inject: swap(false, Session)},
		{Name: "backend swapped under the session, the old one lives on", Victims: 1, Session: true, Hold: 8 * s, Settle: 8 * s, Inject: swap(true, Session)},
		{Name: "backend swapped under the listener", Victims: 1, Settle: 8 * s, Inject: swap(false, Listener)},
		{Name: "backends swapped under all connections", Victims: 2, Session: true, Settle: 8 * s, Inject: swap(false)},

		// The network.
		{Name: "network silent for 3 s", Victims: 1, Cut: true, Hold: 3 * s, Settle: 6 * s, Inject: silent(ToServer, ToClient)},
		{Name: "network silent for 4 s", Victims: 1, Cut: true, Hold: 4 * s, Settle: 6 * s, Inject: silent(ToServer, ToClient)},
		{Name: "network silent for 8 s", Victims: 1, Cut: true, Hold: 8 * s, Settle: 6 * s, Inject: silent(ToServer, ToClient)},
		{Name: "network silent for 12 s", Victims: 1, Cut: true, Hold: 12 * s, Settle: 6 * s, Inject: silent(ToServer, ToClient)},
		{Name: "network silent for 30 s", Victims: 1, Cut: true, Hold: 30 * s, Settle: 6 * s, Inject: silent(ToServer, ToClient)},
		{Name: "network silent to the server", Victims: 1, Cut: true, Hold: 20 * s, Settle: 6 * s, Inject: silent(ToServer)},
		{Name: "network silent to the client", Victims: 1, Cut: true, Hold: 20 * s, Settle: 6 * s, Inject: silent(ToClient)},
		{Name: "network silent for the session alone", Victims: 1, Cut: true, Hold: 20 * s, Settle: 6 * s, Inject: silentRole(Session)},
		{Name: "network silent for the listener alone", Victims: 2, Hold: 15 * s, Settle: 6 * s, Inject: silentRole(Listener)},
		{Name: "network silent for statements alone", Victims: 2, Slow: true, Hold: 12 * s, Settle: 6 * s, Inject: silentRole(Statements)},
		{Name: "latency 200 ms with jitter", Victims: All, Slow: true, Hold: 20 * s, Settle: 3 * s,
			Inject: change(func(s *Shape) { s.Latency, s.Jitter = 200*time.Millisecond, 100*time.Millisecond })},
		{Name: "bandwidth 4 kB/s", Victims: 2, Slow: true, Hold: 20 * s, Settle: 6 * s, Inject: change(func(s *Shape) { s.Rate = 4 << 10 })},
		{Name: "connections refused for 2 s", Victims: All, Cut: true, Hold: 2 * s, Settle: 8 * s, Inject: refuse},
		{Name: "connections refused for a minute", Victims: All, Cut: true, Hold: time.Minute, Settle: 8 * s, Inject: refuse},

		// The server.
		{Name: "server restart (smart)", Victims: All, Session: true, Hold: 5 * s, Settle: 12 * s, Inject: restartSmart},
		{Name: "server restart (fast)", Victims: All, Session: true, Settle: 8 * s, Inject: restart(pgserver.Fast)},
		{Name: "server restart (immediate)", Victims: All, Session: true, Settle: 8 * s, Inject: restart(pgserver.Immediate)},
		{Name: "SIGKILL of a backend (crash recovery)", Victims: All, Session: true, Settle: 8 * s, Inject: killBackend},
		{Name: "server read-only for 3 s", Victims: All, Session: true, Hold: 3 * s, Settle: 6 * s, Inject: readOnly},
		{Name: "server read-only for 12 s", Victims: All, Session: true, Hold: 12 * s, Settle: 8 * s, Inject: readOnly},
		{Name: "logins refused for 2 s", Victims: All, Cut: true, Hold: 2 * s, Settle: 8 * s, Inject: refuseLogins},
		{Name: "logins refused for 15 s", Victims: All, Cut: true, Hold: 15 * s, Settle: 8 * s, Inject: refuseLogins},
		{Name: "max_connections used up by others", Victims: All, Session: true, Hold: 12 * s, Settle: 12 * s, Inject: useUpConnections},
		{Name: "lock table full", Victims: All, Slow: true, Hold: 10 * s, Settle: 4 * s, Inject: fillLockTable},
		{Name: "error replies to the session", Victims: 2, Session: true, Hold: 2 * s, Settle: 5 * s, Inject: errorReplies(1, Session)},
		{Name: "error replies to the listener", Victims: 2, Hold: 4 * s, Settle: 5 * s, Inject: errorReplies(1, Listener)},
		{Name: "error replies to statements", Victims: All, Slow: true, Hold: 8 * s, Settle: 4 * s, Inject: errorReplies(2, Statements)},
		{Name: "NOTIFY fails", Victims: All, Hold: 10 * s, Settle: 5 * s, Inject: failNotify},
		{Name: "flood of foreign and malformed notifications", Victims: All, Hold: 12 * s, Settle: 3 * s, Inject: flood},
		{Name: "tables locked or rebuilt for seconds", Victims: All, Slow: true, Settle: 4 * s, Inject: occupy},
		{Name: "state rows deleted by an operator", Victims: All, Hold: 3 * s, Settle: 6 * s, Inject: deleteRows},
	}
}

func killWorker(_ context.Context, s Scene) (func() error, error) {
	for _, v := range s.Victims {
		s.Kill(v)
	}
	return func() error { return s.revive("") }, nil
}

// revive starts another process in the victims' places.
func (s Scene) revive(binary string) error {
	if binary == "" {
		binary = s.Binary
	}
	var errs []error
	for _, v := range s.Victims {
		errs = append(errs, s.run(v, binary, s.Rand.Uint64()))
	}
	return errors.Join(errs...)
}

func freezeWorker(_ context.Context, s Scene) (func() error, error) {
	var errs []error
	for _, v := range s.Victims {
		errs = append(errs, s.Freeze(v))
	}
	return func() error {
		for _, v := range s.Victims {
			s.Thaw(v)
		}
		return nil
	}, errors.Join(errs...)
}

func terminate(rolesHit ...Role) func(context.Context, Scene) (func() error, error) {
	return func(ctx context.Context, s Scene) (func() error, error) {
		var errs []error
		for _, v := range s.Victims {
			for _, pid := range v.Proxy.Backends(rolesHit...) {
				errs = append(errs, s.Server.Exec(ctx, "SELECT pg_terminate_backend($1)", pid))
			}
		}
		return nil, errors.Join(errs...)
	}
}

func terminateRandom(ctx context.Context, s Scene) (func() error, error) {
	again(ctx, 300*time.Millisecond, 8*time.Second, func() {
		for _, v := range s.Victims {
			// An error means that another fault is active.
			if pids := v.Proxy.Backends(); len(pids) > 0 {
				_ = s.Server.Exec(ctx, "SELECT pg_terminate_backend($1)", pids[s.Rand.IntN(len(pids))])
			}
		}
	})
	return nil, nil
}

// cancelStatements cancels all statements of the workers' backends.
func cancelStatements(ctx context.Context, s Scene) (func() error, error) {
	db, err := sql.Open("postgres", s.Server.URI(Database)+"&connect_timeout=2")
	if err != nil {
		return nil, err
	}
	// An error means that another fault is active.
	again(ctx, 5*time.Millisecond, 8*time.Second, func() {
		_, _ = db.ExecContext(ctx, "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND state = 'active'", User)
	})
	return db.Close, nil
}

func cut(_ context.Context, s Scene) (func() error, error) {
	for _, v := range s.Victims {
		v.Proxy.Cut()
	}
	return nil, nil
}

func flap(ctx context.Context, s Scene) (func() error, error) {
	again(ctx, 300*time.Millisecond, 30*time.Second, func() { _, _ = cut(ctx, s) })
	return nil, nil
}

func swap(keep bool, affected ...Role) func(context.Context, Scene) (func() error, error) {
	return func(_ context.Context, s Scene) (func() error, error) {
		n := 0
		for _, v := range s.Victims {
			n += v.Proxy.Swap(keep, affected...)
		}
		heal := func() error {
			for _, v := range s.Victims {
				v.Proxy.Disown()
			}
			return nil
		}
		if n == 0 {
			return heal, errors.New("no connection was idle")
		}
		return heal, nil
	}
}

// restartSmart waits for the clients to disconnect, which they do not. After a while it continues
// as a fast restart.
func restartSmart(ctx context.Context, s Scene) (func() error, error) {
	pid := s.Server.PID()
	if pid == 0 {
		return nil, pgserver.ErrNotRunning
	}
	return func() error { return s.Server.Restart(ctx, pgserver.Fast) }, syscall.Kill(pid, syscall.SIGTERM)
}

func restart(mode string) func(context.Context, Scene) (func() error, error) {
	return func(ctx context.Context, s Scene) (func() error, error) {
		if mode == pgserver.Immediate {
			s.forget(oracle.ForgetCrash)
			defer s.forget(oracle.ForgetCrash)
		}
		return nil, s.Server.Restart(ctx, mode)
	}
}

// forget records, before and after the event, that the database may forget something.
func (s Scene) forget(class string) {
	s.Record(oracle.Event{At: oracle.Now(), Kind: oracle.Forget, Class: class})
}

func killBackend(_ context.Context, s Scene) (func() error, error) {
	for _, v := range s.Victims {
		for _, pid := range v.Proxy.Backends(Session) {
			s.forget(oracle.ForgetCrash)
			defer s.forget(oracle.ForgetCrash)
			return nil, syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return nil, errors.New("no session to kill")
}

func silent(sides ...Way) func(context.Context, Scene) (func() error, error) {
	return change(func(s *Shape) {
		for _, to := range sides {
			s.Silent[to] = true
		}
	})
}

func silentRole(role Role) func(context.Context, Scene) (func() error, error) {
	return change(func(s *Shape) { s.Silent = [ways]bool{true, true} }, role)
}

// passing contains the SQLSTATEs of temporary errors.
var passing = []string{
	"53300", // too_many_connections
	"53200", // out_of_memory
	"57014", // query_canceled
	"57P01", // admin_shutdown
	"25006", // read_only_sql_transaction
	"40001", // serialization_failure
	"58030", // io_error
	"XX000", // internal_error
}

func errorReplies(odds int, affected ...Role) func(context.Context, Scene) (func() error, error) {
	return change(func(s *Shape) { s.Odds, s.Errors = odds, passing }, affected...)
}

func change(f func(*Shape), affected ...Role) func(context.Context, Scene) (func() error, error) {
	return func(_ context.Context, s Scene) (func() error, error) {
		var undo []func()
		for _, v := range s.Victims {
			undo = append(undo, v.Proxy.Change(f, affected...))
		}
		return func() error {
			for _, u := range undo {
				u()
			}
			return nil
		}, nil
	}
}

func refuse(_ context.Context, s Scene) (func() error, error) {
	for _, v := range s.Victims {
		v.Proxy.Refuse()
	}
	return func() error {
		var errs []error
		for _, v := range s.Victims {
			errs = append(errs, v.Proxy.Accept())
		}
		return errors.Join(errs...)
	}, nil
}

// refuseLogins ends the connections, and lets no client log in again.
func refuseLogins(_ context.Context, s Scene) (func() error, error) {
	codes := []string{"28P01", "28000", "3D000", "53300", "57P03"}
	for _, v := range s.Victims {
		v.Proxy.RefuseLogins(codes[s.Rand.IntN(len(codes))])
		v.Proxy.Cut()
	}
	return func() error {
		for _, v := range s.Victims {
			v.Proxy.AcceptLogins()
		}
		return nil
	}, nil
}

// readOnly makes the server read-only, without closing a connection.
func readOnly(ctx context.Context, s Scene) (func() error, error) {
	return func() error { return s.Server.Set(ctx, "default_transaction_read_only", "off") },
		s.Server.Set(ctx, "default_transaction_read_only", "on")
}

// failNotify puts another pg_notify before the server's own. The workers' search path contains a
// schema for it (see uri). Because the path changes when that schema appears and disappears,
// prepared statements are planned again.
func failNotify(ctx context.Context, s Scene) (func() error, error) {
	heal := func() error {
		// A sequence outlives the transactions that fail.
		n, err := s.Query(ctx, "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM "+shadow+".calls")
		if err == nil && n == 0 {
			err = errors.New("pg_notify was never called")
		}
		return errors.Join(err, s.exec(ctx, "DROP SCHEMA IF EXISTS "+shadow+" CASCADE"))
	}
	return heal, s.exec(ctx, `
		DROP SCHEMA IF EXISTS `+shadow+` CASCADE;
		CREATE SCHEMA `+shadow+`;
		CREATE SEQUENCE `+shadow+`.calls;
		CREATE FUNCTION `+shadow+`.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$
		BEGIN
			PERFORM nextval('`+shadow+`.calls');
			RAISE EXCEPTION 'too many notifications in the NOTIFY queue' USING ERRCODE = '54000';
		END $$;
		GRANT USAGE ON SCHEMA `+shadow+` TO `+User+`;
		GRANT USAGE ON SEQUENCE `+shadow+`.calls TO `+User)
}

// occupy locks the tables like migrations and maintenance.
func occupy(ctx context.Context, s Scene) (func() error, error) {
	// These are the tables of more than one version of the schema.
	const each = `DO $$
		DECLARE t text;
		BEGIN
			FOREACH t IN ARRAY ARRAY['env_locks', 'env_lock_state', 'env_lock_sessions', 'broken_locks', 'broken_sessions'] LOOP
				IF to_regclass(t) IS NOT NULL THEN EXECUTE format('%s', t); END IF;
			END LOOP;
		END $$`
	table := func(statement string) string { return fmt.Sprintf(each, statement) }
	const stay = "; SELECT pg_sleep(2.5)"
	heal := func() error { return s.exec(ctx, table("ALTER TABLE %I DROP COLUMN IF EXISTS chaos")) }
	for _, statements := range []string{
		table("LOCK TABLE %I IN ACCESS EXCLUSIVE MODE") + stay,
		table("SELECT FROM %I FOR UPDATE") + stay,
		table("ALTER TABLE %I ADD COLUMN IF NOT EXISTS chaos integer") + stay,
		table("REINDEX TABLE %I") + stay,
		table("TRUNCATE %I") + stay + "; ROLLBACK",
	} {
		// Without a bound the statements could wait for a transaction that waits for them.
		if err := s.exec(ctx, "SET lock_timeout = '5s'; BEGIN; "+statements+"; COMMIT"); err != nil {
			return heal, err
		}
		pause(ctx, time.Second)
	}
	return heal, nil
}

// useUpConnections takes the connections that are left of max_connections, ends the workers'
// sessions and takes their places, too.
func useUpConnections(ctx context.Context, s Scene) (func() error, error) {
	db, err := sql.Open("postgres", s.Server.URI(Database)+"&connect_timeout=2")
	if err != nil {
		return nil, err
	}
	u := strings.Replace(s.Server.URI("postgres"), "postgres@", User+"@", 1)
	others, err := sql.Open("postgres", u+"&connect_timeout=2&application_name=others")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	heal := func() error {
		cancel()
		<-ended
		return errors.Join(others.Close(), db.Close())
	}
	if err := db.PingContext(ctx); err != nil {
		close(ended)
		return heal, err
	}
	// The goroutine ends with heal.
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			conn, err := others.Conn(ctx)
			if err != nil {
				pause(ctx, 10*time.Millisecond)
				continue
			}
			defer func() { _ = conn.Close() }()
		}
	}()
	pause(ctx, 2*time.Second)
	_, err = db.ExecContext(ctx, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND application_name <> 'others'", User)
	return heal, err
}

// fillLockTable takes advisory locks until the server's lock table is full.
func fillLockTable(ctx context.Context, s Scene) (func() error, error) {
	db, err := sql.Open("postgres", s.Server.URI("postgres")+"&connect_timeout=2") // another database, where the keys are different ones
	if err != nil {
		return nil, err
	}
	conn, err := db.Conn(ctx)
	if err != nil {
		return db.Close, err
	}
	heal := func() error { return errors.Join(conn.Close(), db.Close()) }
	for n, block := 0, 1000; block > 0; {
		_, err := conn.ExecContext(ctx, "SELECT count(pg_advisory_lock(g)) FROM generate_series($1::bigint, $2) g", n, n+block-1)
		n += block
		if err != nil {
			block /= 10
		}
		if n > 1<<20 {
			return heal, errors.New("the lock table has no end")
		}
	}
	return heal, nil
}

// flood sends foreign messages on the library's channel: garbage, messages of other software,
// claims of no process, and releases that did not happen.
func flood(ctx context.Context, s Scene) (func() error, error) {
	db, err := sql.Open("postgres", s.Server.URI(Database)+"&connect_timeout=2")
	if err != nil {
		return nil, err
	}
	if err := db.PingContext(ctx); err != nil {
		return db.Close, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	// The goroutine ends with heal.
	go func() {
		defer close(ended)
		for ctx.Err() == nil {
			// An error means that another fault is active.
			_, _ = db.ExecContext(ctx, `
				SELECT pg_notify(c, p) FROM unnest(ARRAY['env_lock_events', 'broken_released', 'other']) c, unnest(ARRAY[
					'', 'x', '{', '{}', 'null', '[1,2]', '"claim"', '{"kind":"claim"}', '{"kind":"claim","lockKey":"seven"}',
					'{"kind":"nonsense","lockKey":1}', '{"lockKey":1e400}', '{"kind":"claim","lockKey":9223372036854775808}',
					'{"kind":"check","id":"00000000-0000-0000-0000-000000000000"}', '{"lockKey":-1,"event":"no process holds this"}',
					repeat('9', 7999), '{"event":"' || repeat('\u0000', 1300) || '"}', repeat('{"a":', 1500),
					chr(1) || chr(127) || chr(65533), random()::text]) p`)
			_, _ = db.ExecContext(ctx, `
				SELECT pg_notify('env_lock_events', m) FROM env_lock_state s, LATERAL (VALUES
					('{"kind":"released","lockKey":' || s.lock_key || '}'),
					('{"kind":"claim","lockKey":' || s.lock_key || ',"claim":0,"id":"`+stranger+`","event":"an old claim"}'),
					('{"kind":"claim","lockKey":' || s.lock_key || ',"claim":-9223372036854775808,"id":"`+stranger+`"}')) v(m)`)
			_, _ = db.ExecContext(ctx, `SELECT pg_notify('broken_released', g::text) FROM generate_series(1, 64) g`)
			pause(ctx, 20*time.Millisecond)
		}
	}()
	return func() error { cancel(); <-ended; return db.Close() }, nil
}

const stranger = "deadbeef-0000-4000-8000-000000000000"

func deleteRows(ctx context.Context, s Scene) (func() error, error) {
	for range 3 {
		s.forget(oracle.ForgetRows)
		_, err := s.Query(ctx, "WITH gone AS (DELETE FROM env_lock_state RETURNING 1) SELECT count(*) FROM gone")
		s.forget(oracle.ForgetRows)
		if err != nil {
			return nil, err
		}
		pause(ctx, time.Second)
	}
	return nil, nil
}

func burst(_ context.Context, s Scene) (func() error, error) {
	var errs []error
	for _, v := range s.Victims {
		errs = append(errs, s.Command(v, fmt.Sprintf("burst %d %d", 1000/len(s.Victims), s.Base+int64(s.Keys))))
	}
	return nil, errors.Join(errs...)
}

// skew runs a worker whose wall clock jumps between an hour ahead and an hour behind, and ends its
// session meanwhile.
func skew(ctx context.Context, s Scene) (func() error, error) {
	if s.Skewed == "" {
		return nil, errors.New("no worker with a wrong clock")
	}
	for _, v := range s.Victims {
		s.Kill(v)
	}
	if err := s.revive(s.Skewed); err != nil {
		return nil, err
	}
	for range 3 {
		pause(ctx, 5*time.Second)
		ended := Fault{Name: "session terminated", Session: true, Inject: terminate(Session)}
		if err := ended.Run(ctx, s.World, s.Victims, s.Rand); err != nil {
			return nil, err
		}
	}
	return func() error {
		for _, v := range s.Victims {
			s.Kill(v)
		}
		return s.revive("")
	}, nil
}
