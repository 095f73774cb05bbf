package fault

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/preemptable/locker/chaos/oracle"
	"github.com/preemptable/locker/internal/pgserver"
)

// Database is the database of the locks, and User is the role with which the workers connect.
const (
	Database = "chaos"
	User     = "app"
)

// World is one server with its workers.
type World struct {
	Server   *pgserver.Server
	FenceURI string
	Binary   string          // the path of the worker
	Skewed   string          // the path of a worker whose wall clock is wrong, or empty
	Args     []string        // of the workers, in addition to those that every worker has
	Sessions []time.Duration // timeouts of the workers' sessions, alternating
	Base     int64           // the number before the first key
	Keys     int
	Hosts    []*Proxy // the hosts of the URI, if the workers share their network, otherwise each worker has a separate proxy
	Record   func(oracle.Event)

	mu      sync.Mutex // guards everything below
	workers []*Worker
	places  int // how many there were in the end
	started int
	errs    []error
}

// Worker is a place for worker processes, one after the other.
type Worker struct {
	Name  string // of the present process
	Proxy *Proxy // nil if the network is shared

	slot    int
	cmd     *exec.Cmd
	stdin   io.WriteCloser
	freezer *freezer
	done    chan struct{} // closed when the process has ended and its output has been read
}

// NewServer starts a server for the locks.
func NewServer(ctx context.Context, config map[string]string) (*pgserver.Server, error) {
	server, err := pgserver.Start(ctx, pgserver.Options{Config: config})
	if err != nil {
		return nil, err
	}
	for _, statement := range []string{"CREATE ROLE " + User + " LOGIN", "CREATE DATABASE " + Database + " OWNER " + User} {
		if err := server.Exec(ctx, statement); err != nil {
			return nil, errors.Join(err, server.Close())
		}
	}
	return server, nil
}

// shadow is a schema whose functions take precedence over the server's own, while it exists.
const shadow = "chaos_shadow"

// uri returns the URI that a worker connects to, with all hosts, in lib/pq's form. New tables are
// created in the first schema of the path.
func uri(proxies ...*Proxy) string {
	var hosts, ports []string
	for _, p := range proxies {
		host, port, _ := strings.Cut(p.Address(), ":")
		hosts, ports = append(hosts, host), append(ports, port)
	}
	return fmt.Sprintf("postgres://%s@%s/%s?port=%s&sslmode=disable&search_path=public,%s,pg_catalog", User, strings.Join(hosts, ","), Database, strings.Join(ports, ","), shadow)
}

// Start adds a worker.
func (w *World) Start(seed uint64) error {
	v, err := w.place()
	if err != nil {
		return err
	}
	return w.run(v, w.Binary, seed)
}

// place adds a place for a worker.
func (w *World) place() (*Worker, error) {
	v := &Worker{}
	if len(w.Hosts) == 0 {
		target, err := url.Parse(w.Server.URI(Database))
		if err != nil {
			return nil, err
		}
		if v.Proxy, err = NewProxy(target.Host); err != nil {
			return nil, err
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.workers = append(w.workers, v)
	v.slot = len(w.workers)
	return v, nil
}

// run starts a process in a worker's place.
func (w *World) run(v *Worker, binary string, seed uint64, extra ...string) error {
	w.mu.Lock()
	w.started++
	v.Name = fmt.Sprintf("w%d.%d", w.Base+int64(v.slot), w.started)
	if slices.Contains(extra, "-sweep") {
		v.Name += ".sweep"
	}
	w.mu.Unlock()
	hosts := w.Hosts
	if v.Proxy != nil {
		hosts = []*Proxy{v.Proxy}
	}
	args := append([]string{
		"-name", v.Name, "-uri", uri(hosts...), "-fence", w.FenceURI, "-seed", strconv.FormatUint(seed, 10),
		"-session-timeout", w.Sessions[v.slot%len(w.Sessions)].String(), "-base", strconv.FormatInt(w.Base, 10), "-keys", strconv.Itoa(w.Keys),
	}, append(w.Args, extra...)...)
	v.cmd = exec.Command(binary, args...)
	v.cmd.Stderr = os.Stderr
	// ^C is meant for the driver.
	v.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := v.cmd.StdinPipe()
	if err != nil {
		return err
	}
	w.mu.Lock()
	v.stdin = stdin
	w.mu.Unlock()
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := v.cmd.Start(); err != nil {
		return err
	}
	v.done = make(chan struct{})
	// The goroutine ends with the process.
	go w.read(out, v.cmd, v.Name, v.done)
	return nil
}

func (w *World) read(out io.Reader, cmd *exec.Cmd, name string, done chan struct{}) {
	defer close(done)
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var e oracle.Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			// This is the last line of a worker that was killed.
			continue
		}
		w.Record(e)
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		w.Record(oracle.Event{At: oracle.Now(), Kind: oracle.Killed, Worker: name})
		w.fail(fmt.Errorf("worker %s ended by itself: %w", name, err))
	}
}

func (w *World) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.errs = append(w.errs, err)
}

// Err returns the errors of the workers themselves.
func (w *World) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return errors.Join(w.errs...)
}

// Workers returns the workers that run.
func (w *World) Workers() []*Worker {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]*Worker(nil), w.workers...)
}

// private returns a key that only one worker claims.
func (w *World) private(v *Worker) int64 { return w.Base + int64(w.Keys+v.slot) }

// Names returns the names of the workers' processes.
func (w *World) Names(workers []*Worker) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var names []string
	for _, v := range workers {
		names = append(names, v.Name)
	}
	return names
}

// Kill ends a worker's process by SIGKILL.
func (w *World) Kill(v *Worker) {
	_ = v.cmd.Process.Kill()
	<-v.done
	w.Record(oracle.Event{At: oracle.Now(), Kind: oracle.Killed, Worker: v.Name})
}

// Command sends a line to a worker.
func (w *World) Command(v *Worker, line string) error {
	w.mu.Lock()
	stdin := v.stdin
	w.mu.Unlock()
	_, err := fmt.Fprintln(stdin, line)
	return err
}

// freezer is a shell that stops a process until the shell's standard input ends. The process then
// continues, and can end, whatever happens to the driver.
type freezer struct {
	cmd   *exec.Cmd
	stdin io.Closer
}

// Freeze stops a worker's process.
func (w *World) Freeze(v *Worker) error {
	cmd := exec.Command("/bin/sh", "-c", `kill -STOP "$1" && echo && read -r _; kill -CONT "$1"`, "freezer", strconv.Itoa(v.cmd.Process.Pid))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	at := oracle.Now()
	if err := cmd.Start(); err != nil {
		return err
	}
	v.freezer = &freezer{cmd, stdin}
	// The process has been stopped.
	_, _ = out.Read(make([]byte, 1))
	w.Record(oracle.Event{At: at, Kind: oracle.Frozen, Worker: v.Name})
	return nil
}

// Thaw ends a Freeze.
func (w *World) Thaw(v *Worker) {
	if v.freezer == nil {
		return
	}
	// The process notices the end of the stop later.
	at := oracle.Now()
	_ = v.freezer.stdin.Close()
	_ = v.freezer.cmd.Wait()
	v.freezer = nil
	w.Record(oracle.Event{At: at, Kind: oracle.Thawed, Worker: v.Name})
}

// Query runs one statement in the locks' database as superuser, without the proxies, and returns
// its number.
func (w *World) Query(ctx context.Context, query string, args ...any) (n int64, err error) {
	db, err := sql.Open("postgres", w.Server.URI(Database)+"&connect_timeout=2")
	if err != nil {
		return 0, err
	}
	defer func() { _ = db.Close() }()
	err = db.QueryRowContext(ctx, query, args...).Scan(&n)
	return n, err
}

// exec runs statements as superuser, without the proxies, all on one connection.
func (w *World) exec(ctx context.Context, statements string) error {
	db, err := sql.Open("postgres", w.Server.URI(Database)+"&connect_timeout=2&default_transaction_read_only=off")
	if err != nil {
		return err
	}
	defer func() { _ = db.Close() }()
	_, err = db.ExecContext(ctx, statements)
	return err
}

// await waits until the server accepts writes, but not for longer than patience.
func (w *World) await(ctx context.Context, patience time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for ctx.Err() == nil {
		n, err := w.Query(ctx, "SELECT (pg_is_in_recovery() OR current_setting('default_transaction_read_only')::boolean)::integer")
		if err == nil && n == 0 {
			return
		}
		pause(ctx, 20*time.Millisecond)
	}
}

// End stops the workers and returns everything that is left over.
func (w *World) End(ctx context.Context) []string {
	var left []string
	workers := w.Workers()
	w.places = len(workers)
	for _, v := range workers {
		_ = w.Command(v, "stop")
	}
	limit, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for _, v := range workers {
		select {
		case <-v.done:
		case <-limit.Done():
			left = append(left, v.Name+" did not end within 30s of being asked to")
			// The signal makes the process print its stacks.
			_ = v.cmd.Process.Signal(syscall.SIGQUIT)
			select {
			case <-v.done:
			case <-time.After(5 * time.Second):
			}
			_ = v.cmd.Process.Kill()
			<-v.done
		}
		if v.Proxy != nil {
			v.Proxy.Close()
		}
	}
	w.mu.Lock()
	w.workers = nil
	w.mu.Unlock()
	return append(left, w.leftOver(ctx)...)
}

// leftOver looks for connections and advisory locks, which the server may keep for the lease, and
// then for keys that cannot be locked and rows that still name a holder.
func (w *World) leftOver(ctx context.Context) (left []string) {
	none := func(what, query string, patience time.Duration) {
		var n int64
		var err error
		for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
			if n, err = w.Query(ctx, query); err == nil && n == 0 || time.Now().After(deadline) {
				break
			}
		}
		if err != nil {
			left = append(left, fmt.Sprintf("%s: %v", what, err))
		} else if n != 0 {
			left = append(left, fmt.Sprintf("%s: %d", what, n))
		}
	}
	none("connections", "SELECT count(*) FROM pg_stat_activity WHERE usename = '"+User+"'", 20*time.Second)
	none("advisory locks", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'", time.Second)
	if len(w.Args) > 0 && w.Args[0] == "-provider" {
		return left
	}
	v, err := w.place()
	if err == nil {
		err = w.run(v, w.Binary, 0, "-sweep", "-keys", strconv.Itoa(w.Keys+w.places))
	}
	if err != nil {
		return append(left, err.Error())
	}
	select {
	case <-v.done:
	case <-time.After(40 * time.Second):
		left = append(left, "the last claims of all keys hang")
		_ = v.cmd.Process.Kill()
		<-v.done
	}
	if v.Proxy != nil {
		v.Proxy.Close()
	}
	none("rows that name a holder", "SELECT count(*) FROM env_lock_state WHERE holder_id IS NOT NULL", time.Second)
	none("rows", "SELECT count(*) FROM env_lock_state WHERE lock_key NOT IN (SELECT lock_key FROM env_locks)", time.Second)
	return left
}
