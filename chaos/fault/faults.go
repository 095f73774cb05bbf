package fault

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

// Fault is something that can go wrong, once or again and again.
type Fault struct {
	Name    string
	Victims int           // how many workers it hits; All for all of them
	Session bool          // it may keep the victims' sessions from working
	Bound   time.Duration // holders of the victims are notified within this time; 0: they need not be
	Hold    time.Duration // until it is healed
	Settle  time.Duration // until the next one
	Alone   bool          // not to be mixed with others
	// Inject begins it, and heal ends it.
	Inject func(ctx context.Context, s Scene) (heal func() error, err error)
}

// All are all the workers.
const All = -1

// Scene is what a fault is given.
type Scene struct {
	*World
	Fault   string
	Victims []*Worker
	Rand    *rand.Rand
}

// ids number the instances of faults.
var ids atomic.Int64

// Run injects a fault, waits and heals it. The error says that it could not be
// injected, which happens when faults are mixed.
func (f Fault) Run(ctx context.Context, w *World, victims []*Worker, r *rand.Rand) error {
	for _, v := range victims { // holders for the fault to hit
		_ = w.Command(v, fmt.Sprintf("hold %d", w.private(v)))
	}
	if len(victims) > 0 {
		pause(ctx, time.Second)
	}
	id := int(ids.Add(1))
	w.Record(oracle.Event{At: oracle.Now(), Kind: oracle.Inject, ID: id, Fault: f.Name, Victims: w.Names(victims), Session: f.Session, Bound: int64(f.Bound)})
	heal, err := f.Inject(ctx, Scene{w, f.Name, victims, r})
	if err == nil {
		pause(ctx, f.Hold)
	}
	if heal != nil {
		err = errors.Join(err, heal())
	}
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

// atOnce is the bound of a loss that the worker's own machine reports: the end of
// a connection.
const atOnce = time.Second

// silence is C24's bound for a network that goes silent.
const silence = 9 * time.Second

// Faults are all of them, except the loss of a primary, which needs a world of
// its own.
func Faults() []Fault {
	return []Fault{
		{Name: "none", Hold: 15 * time.Second, Alone: true, Inject: func(context.Context, Scene) (func() error, error) { return nil, nil }},
		{Name: "SIGKILL of a worker", Victims: 1, Hold: 3 * time.Second, Settle: 9 * time.Second, Inject: killWorker},
		{Name: "SIGSTOP of a worker for 20 s", Victims: 1, Hold: 20 * time.Second, Settle: 6 * time.Second, Inject: freezeWorker},
		// Longer than the lease and the successor's lock delay: two believe that they hold.
		{Name: "SIGSTOP of a worker for 32 s", Victims: 1, Hold: 32 * time.Second, Settle: 6 * time.Second, Inject: freezeWorker},
		{Name: "session terminated", Victims: 1, Session: true, Bound: atOnce, Settle: 6 * time.Second, Inject: terminate(Session)},
		{Name: "listener terminated", Victims: 1, Settle: 4 * time.Second, Inject: terminate(Listener)},
		{Name: "session and listener terminated", Victims: All, Session: true, Bound: atOnce, Settle: 12 * time.Second, Inject: terminate(Session, Listener)},
		{Name: "server restart (smart)", Victims: All, Session: true, Hold: 5 * time.Second, Settle: 12 * time.Second, Inject: restartSmart},
		{Name: "server restart (fast)", Victims: All, Session: true, Bound: 2 * time.Second, Settle: 12 * time.Second, Inject: restart(pgserver.Fast)},
		{Name: "server restart (immediate)", Victims: All, Session: true, Bound: 2 * time.Second, Settle: 12 * time.Second, Inject: restart(pgserver.Immediate)},
		{Name: "SIGKILL of a backend (crash recovery)", Victims: All, Session: true, Bound: 2 * time.Second, Settle: 12 * time.Second, Inject: killBackend},
		{Name: "network silent to the server", Victims: 1, Session: true, Bound: silence, Hold: 20 * time.Second, Settle: 6 * time.Second, Inject: silent(ToServer)},
		{Name: "network silent to the client", Victims: 1, Session: true, Bound: silence, Hold: 20 * time.Second, Settle: 6 * time.Second, Inject: silent(ToClient)},
		{Name: "network silent both ways", Victims: 1, Session: true, Bound: silence, Hold: 20 * time.Second, Settle: 6 * time.Second, Inject: silent(ToServer, ToClient)},
		{Name: "network silent for the session alone", Victims: 1, Session: true, Bound: silence, Hold: 20 * time.Second, Settle: 6 * time.Second, Inject: silentRole(Session)},
		{Name: "network silent for the listener alone", Victims: 2, Hold: 15 * time.Second, Settle: 6 * time.Second, Inject: silentRole(Listener)},
		{Name: "latency 200 ms with jitter", Victims: All, Session: true, Hold: 20 * time.Second, Settle: 3 * time.Second,
			Inject: shape(func(s *Shape) { s.Latency, s.Jitter = 200*time.Millisecond, 100*time.Millisecond })},
		{Name: "bandwidth 4 kB/s", Victims: 2, Session: true, Hold: 20 * time.Second, Settle: 6 * time.Second,
			Inject: shape(func(s *Shape) { s.Rate = 4 << 10 })},
		{Name: "connections refused for a minute", Victims: All, Session: true, Bound: atOnce, Hold: time.Minute, Settle: 8 * time.Second, Inject: refuse},
		{Name: "max_connections used up by others", Victims: All, Session: true, Hold: 12 * time.Second, Settle: 12 * time.Second, Inject: useUpConnections},
		{Name: "lock table full", Hold: 10 * time.Second, Settle: 4 * time.Second, Inject: fillLockTable},
		{Name: "flood of foreign and malformed notifications", Hold: 12 * time.Second, Settle: 3 * time.Second, Inject: flood},
		{Name: "state rows deleted by an operator", Hold: 3 * time.Second, Settle: 6 * time.Second, Inject: deleteRows},
		{Name: "1000 claimants on one key", Victims: All, Hold: 10 * time.Second, Settle: 4 * time.Second, Alone: true, Inject: burst},
		{Name: "wall clock of a worker 1 h off", Victims: 1, Hold: 30 * time.Second, Settle: 8 * time.Second, Alone: true, Inject: skew},
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
		// Its server session has ended meanwhile: from now on it can know.
		s.Record(oracle.Event{At: oracle.Now(), Kind: oracle.Inject, ID: int(ids.Add(1)), Fault: s.Fault, Victims: s.Names(s.Victims), Session: true, Bound: int64(atOnce)})
		return nil
	}, errors.Join(errs...)
}

func terminate(rolesHit ...Role) func(context.Context, Scene) (func() error, error) {
	return func(ctx context.Context, s Scene) (func() error, error) {
		var errs []error
		for _, v := range s.Victims {
			for _, role := range rolesHit {
				for _, pid := range v.Proxy.Backends(role) {
					errs = append(errs, s.Server.Exec(ctx, "SELECT pg_terminate_backend($1)", pid))
				}
			}
		}
		return nil, errors.Join(errs...)
	}
}

// restartSmart waits for the clients to leave, which they do not, and goes on as
// fast after a while.
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

// forget goes into the history before and after it may happen.
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
	return shape(func(s *Shape) {
		for _, to := range sides {
			s.Silent[to] = true
		}
	})
}

func silentRole(role Role) func(context.Context, Scene) (func() error, error) {
	return change(func(s *Shape) { s.Silent = [ways]bool{true, true} }, role)
}

func shape(f func(*Shape)) func(context.Context, Scene) (func() error, error) {
	return change(f, Session, Listener)
}

func change(f func(*Shape), affected ...Role) func(context.Context, Scene) (func() error, error) {
	return func(_ context.Context, s Scene) (func() error, error) {
		for _, v := range s.Victims {
			v.Proxy.Change(f, affected...)
		}
		return func() error {
			for _, v := range s.Victims {
				v.Proxy.Change(func(s *Shape) { *s = Shape{} }, Session, Listener)
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

// useUpConnections takes what is left of max_connections, ends the workers'
// sessions and takes those places, too.
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
	go func() { // ends with heal
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

// fillLockTable takes advisory locks until the server has no room for more.
func fillLockTable(ctx context.Context, s Scene) (func() error, error) {
	db, err := sql.Open("postgres", s.Server.URI("postgres")+"&connect_timeout=2") // another database: other keys
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

// flood sends what has no business on the library's channel: garbage, other
// software's messages, claims of no process, and releases that did not happen.
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
	go func() { // ends with heal
		defer close(ended)
		for ctx.Err() == nil {
			// An error means that another fault is at work.
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
					('{"kind":"claim","lockKey":' || s.lock_key || ',"claim":1,"id":"`+stranger+`","event":"an old claim"}'),
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

// skew runs a worker whose wall clock jumps between an hour ahead and an hour
// behind, and ends its session meanwhile.
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
		if _, err := terminate(Session)(ctx, s); err != nil {
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
