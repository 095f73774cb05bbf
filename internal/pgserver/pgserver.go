// Package pgserver runs throwaway PostgreSQL servers for tests, the demo, benchmarks and the chaos
// driver.
//
// A server is a separate cluster in a temporary folder. It is created by initdb and runs with stock
// settings (fsync included) on a separate TCP port. It needs no container engine, no installed
// service and no privileges: the server programs of an ordinary package are enough. A process of
// root runs the server as an unprivileged user, because PostgreSQL refuses to run as root.
//
// Nothing is left behind. Close removes process and folder. If the process that started the server
// ends without Close, even by SIGKILL, a small shell notices and does it instead. The package keeps
// no goroutine, so leak checkers stay usable.
package pgserver

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
)

// The modes in which a server is stopped, in PostgreSQL's own words.
const (
	Smart     = "smart"     // waits until every client has disconnected
	Fast      = "fast"      // ends the sessions, then shuts down cleanly
	Immediate = "immediate" // ends everything immediately, so the next start recovers
)

const (
	startTimeout = 60 * time.Second
	stopTimeout  = 60 * time.Second
	portAttempts = 10
)

// ErrNotRunning is returned by methods that need a running server.
var ErrNotRunning = errors.New("pgserver: server is not running")

// errPortTaken distinguishes a lost race for the port from other failures of a start.
var errPortTaken = errors.New("pgserver: port is taken")

// Options are the settings of a server. The zero value is a stock server on a free port of
// 127.0.0.1 that trusts every client.
type Options struct {
	BinDir   string            // folder of initdb and postgres, or empty to use FindBinDir
	Config   map[string]string // settings for postgresql.conf that override the stock ones
	Port     int               // 0 for a free one
	Host     string            // address to listen on, or empty for 127.0.0.1
	Password string            // empty for trust, otherwise required by scram-sha-256
	Files    map[string]string // files of the data folder by name, such as pg_hba.conf or server.key, which replace those of initdb
	Log      io.Writer         // receives the server's log in parts, after each start and stop
}

// Server is one PostgreSQL cluster. Its methods may be called from several goroutines.
type Server struct {
	opts    Options
	binDir  string
	version string
	dir     string
	runAs   *account // nil to run as this process

	mu      sync.Mutex // guards everything below
	port    int
	cmd     *exec.Cmd // nil while the server is stopped
	alive   *os.File  // see launch
	guard   *watchdog
	logRead int64
	closed  bool
}

// Start creates a cluster and starts it. The server accepts connections when Start returns. A
// cluster that could not be started leaves nothing behind.
func Start(ctx context.Context, opts Options) (*Server, error) {
	s, err := prepare(ctx, opts)
	if err != nil {
		return nil, err
	}
	if err := s.initdb(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := s.configure(opts.Config); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := s.put(opts.Files); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	if err := s.Start(ctx); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// prepare creates the empty folder and everything that does not depend on where the data comes
// from.
func prepare(ctx context.Context, opts Options) (*Server, error) {
	if opts.Host == "" {
		opts.Host = "127.0.0.1"
	}
	opts.Config = maps.Clone(opts.Config)
	s := &Server{opts: opts, binDir: opts.BinDir, port: opts.Port}
	var err error
	if s.binDir == "" {
		if s.binDir, err = FindBinDir(); err != nil {
			return nil, err
		}
	} else if !hasServer(s.binDir) {
		return nil, fmt.Errorf("pgserver: no initdb and postgres in %s", s.binDir)
	}
	if s.runAs, err = unprivileged(); err != nil {
		return nil, err
	}
	if s.version, err = readVersion(ctx, s.binDir); err != nil {
		return nil, err
	}
	if s.dir, err = s.tempDir(); err != nil {
		return nil, err
	}
	if s.guard, err = watch(s.dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(s.dir))
	}
	return s, nil
}

// tempDir creates the cluster's folder where the account that runs the server can reach it. The
// usual temporary folder may be below one that only this process's user may enter.
func (s *Server) tempDir() (string, error) {
	parents := []string{os.TempDir(), "/tmp", "/var/tmp"}
	for _, parent := range parents {
		if s.runAs != nil && !openToAll(parent) {
			continue
		}
		dir, err := os.MkdirTemp(parent, "pgserver-")
		if err != nil {
			continue
		}
		if dir, err = filepath.EvalSymlinks(dir); err != nil {
			return "", err
		}
		if err := s.runAs.own(dir); err != nil {
			return "", errors.Join(err, os.RemoveAll(dir))
		}
		return dir, nil
	}
	return "", fmt.Errorf("pgserver: no usable temporary folder among %s", strings.Join(parents, ", "))
}

func (s *Server) initdb(ctx context.Context) error {
	args := []string{
		"--pgdata", s.DataDir(), "--username", "postgres", "--encoding", "UTF8", "--locale", "C",
		// The folder lives for minutes, so initdb need not sync it. The server itself runs with
		// fsync.
		"--no-sync",
		"--auth-local", "trust", "--auth-host", s.authMethod(),
	}
	if s.opts.Password != "" {
		file := filepath.Join(s.dir, "password")
		if err := os.WriteFile(file, []byte(s.opts.Password+"\n"), 0o600); err != nil {
			return err
		}
		defer func() { _ = os.Remove(file) }()
		if err := s.runAs.own(file); err != nil {
			return err
		}
		args = append(args, "--pwfile", file)
	}
	if err := s.run(ctx, "initdb", args...); err != nil {
		return err
	}
	if ip := net.ParseIP(s.opts.Host); ip != nil && ip.IsLoopback() || s.opts.Host == "localhost" {
		return nil
	}
	// The rules of initdb allow only loopback addresses.
	rules := fmt.Sprintf("host all all all %[1]s\nhost replication all all %[1]s\n", s.authMethod())
	return appendFile(filepath.Join(s.DataDir(), "pg_hba.conf"), rules)
}

func (s *Server) authMethod() string {
	if s.opts.Password == "" {
		return "trust"
	}
	return "scram-sha-256"
}

var settingName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_.]*$`)

// configure appends settings to postgresql.conf, where the last line for a name wins. The port is
// not among them. It is given on the command line, so that neither a lost race nor a standby's copy
// has to rewrite the file.
func (s *Server) configure(settings map[string]string) error {
	var b strings.Builder
	write := func(name, value string) {
		fmt.Fprintf(&b, "%s = '%s'\n", name, strings.ReplaceAll(value, "'", "''"))
	}
	write("listen_addresses", s.opts.Host)
	write("unix_socket_directories", "")
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if !settingName.MatchString(name) || strings.ContainsAny(settings[name], "\n\x00") {
			return fmt.Errorf("pgserver: invalid setting %q = %q", name, settings[name])
		}
		write(name, settings[name])
	}
	return appendFile(filepath.Join(s.DataDir(), "postgresql.conf"), b.String())
}

// put writes files into the data folder. Only the account that runs the server can read them.
func (s *Server) put(files map[string]string) error {
	for name, text := range files {
		path := filepath.Join(s.DataDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return err
		}
		if err := s.runAs.own(path); err != nil {
			return err
		}
	}
	return nil
}

// Start starts a stopped server again, on the same port and data. It does nothing if the server
// runs.
func (s *Server) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.start(ctx)
}

func (s *Server) start(ctx context.Context) error {
	if s.closed {
		return errors.New("pgserver: server is closed")
	}
	if s.cmd != nil {
		if !s.gone(time.Millisecond) {
			return nil
		}
		s.reap()
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	fixed := s.port != 0
	for attempt := 1; ; attempt++ {
		if !fixed {
			port, err := freePort(s.opts.Host)
			if err != nil {
				return err
			}
			s.port = port
		}
		err := s.launch(ctx)
		if err == nil || !errors.Is(err, errPortTaken) || attempt == portAttempts {
			if err != nil && !fixed {
				s.port = 0
			}
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(time.Duration(attempt) * 50 * time.Millisecond):
		}
	}
}

// launch starts the postmaster and waits until it accepts connections.
//
// The postmaster and, by inheritance, every process of the server have the writing end of a pipe,
// which none of them writes to. Its reading end reports end of file exactly when the last of these
// processes has ended. That works even for children that outlive a killed postmaster, and takes no
// goroutine.
func (s *Server) launch(ctx context.Context) error {
	log, err := os.OpenFile(s.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	logged, err := log.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := s.command("postgres", "-D", s.DataDir(), "-p", strconv.Itoa(s.port))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{w}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		_ = r.Close()
		return fmt.Errorf("pgserver: %w", err)
	}
	s.cmd, s.alive = cmd, r
	s.guard.running(cmd.Process.Pid)
	defer s.copyLog()

	for {
		if s.gone(20 * time.Millisecond) {
			s.reap()
			text := s.logFrom(logged)
			err := fmt.Errorf("pgserver: the server ended while starting; its log ends with:\n%s", tail(text))
			if strings.Contains(text, "could not bind") || strings.Contains(text, "could not create any TCP/IP sockets") {
				err = fmt.Errorf("%w: %w", errPortTaken, err)
			}
			return err
		}
		// A connection before the server is ready could reach another server that has the port.
		probe := errors.New("it is still starting")
		if s.ready() {
			probe = s.probe(ctx)
		}
		if probe == nil {
			return nil
		}
		if ctx.Err() != nil {
			err := fmt.Errorf("pgserver: the server did not answer in time: %w (%w); its log ends with:\n%s",
				context.Cause(ctx), probe, tail(s.logFrom(logged)))
			return errors.Join(err, s.kill())
		}
	}
}

// ready reads the postmaster's own report: its process ID in the first line of postmaster.pid, its
// state in the eighth.
func (s *Server) ready() bool {
	text, err := os.ReadFile(filepath.Join(s.DataDir(), "postmaster.pid"))
	if err != nil {
		return false
	}
	lines := strings.Split(string(text), "\n")
	if len(lines) < 8 || lines[0] != strconv.Itoa(s.cmd.Process.Pid) {
		return false
	}
	state := strings.TrimSpace(lines[7])
	return state == "ready" || state == "standby"
}

// probe connects once and makes sure that it has reached this server.
func (s *Server) probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	return withDB(s.uri("postgres"), func(db *sql.DB) error {
		var data string
		if err := db.QueryRowContext(ctx, "SHOW data_directory").Scan(&data); err != nil {
			return err
		}
		if data != s.DataDir() {
			return fmt.Errorf("pgserver: the server at port %d is another one", s.port)
		}
		return nil
	})
}

// Stop stops the server and keeps its data: Start runs it again, and Close removes it. Stop returns
// when every process of the server has ended. It does nothing if the server is stopped already.
func (s *Server) Stop(mode string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stop(mode, stopTimeout)
}

func (s *Server) stop(mode string, timeout time.Duration) error {
	signal, err := stopSignal(mode)
	if err != nil {
		return err
	}
	if s.cmd == nil {
		return nil
	}
	if err := s.cmd.Process.Signal(signal); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("pgserver: stop: %w", err)
	}
	if !s.gone(timeout) {
		return fmt.Errorf("pgserver: the server has not stopped (%s) in %s", mode, timeout)
	}
	s.reap()
	s.copyLog()
	return nil
}

// Restart stops the server and starts it again on the same port.
func (s *Server) Restart(ctx context.Context, mode string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stop(mode, stopTimeout); err != nil {
		return err
	}
	return s.start(ctx)
}

// Kill ends every process of the server by SIGKILL, like a power cut, and keeps its data: Start
// recovers it.
func (s *Server) Kill() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.kill()
}

func (s *Server) kill() error {
	if s.cmd == nil {
		return nil
	}
	// The children are sessions of the operating system, so a signal to the postmaster's group
	// would not reach them.
	pids := append([]int{s.cmd.Process.Pid}, children(s.cmd.Process.Pid)...)
	for _, pid := range pids {
		_ = signalKill(pid)
	}
	if !s.gone(stopTimeout) {
		return fmt.Errorf("pgserver: processes of the server outlived SIGKILL for %s", stopTimeout)
	}
	s.reap()
	s.copyLog()
	return nil
}

// Freeze stops every process of the server. Connections stay open, and get no response. Thaw lets
// the processes continue.
func (s *Server) Freeze() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return ErrNotRunning
	}
	// The postmaster comes first, so that the list of its children is final.
	if err := signalStop(s.cmd.Process.Pid); err != nil {
		return fmt.Errorf("pgserver: freeze: %w", err)
	}
	for _, pid := range children(s.cmd.Process.Pid) {
		_ = signalStop(pid)
	}
	return nil
}

// Thaw ends a Freeze.
func (s *Server) Thaw() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return ErrNotRunning
	}
	for _, pid := range children(s.cmd.Process.Pid) {
		_ = signalContinue(pid)
	}
	if err := signalContinue(s.cmd.Process.Pid); err != nil {
		return fmt.Errorf("pgserver: thaw: %w", err)
	}
	return nil
}

// Close stops the server, by force if it has to, and removes its folder. A standby of the server is
// closed separately, preferably before its primary.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.cmd != nil {
		for _, pid := range children(s.cmd.Process.Pid) {
			_ = signalContinue(pid)
		}
		_ = signalContinue(s.cmd.Process.Pid)
	}
	err := s.stop(Fast, 10*time.Second)
	if err != nil {
		err = s.stop(Immediate, 10*time.Second)
	}
	if err != nil {
		err = s.kill()
	}
	return errors.Join(err, os.RemoveAll(s.dir), s.guard.dismiss())
}

// gone waits for the end of the server's last process, and reports whether it has ended.
func (s *Server) gone(timeout time.Duration) bool {
	if err := s.alive.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return false
	}
	_, err := s.alive.Read(make([]byte, 1))
	return errors.Is(err, io.EOF)
}

func (s *Server) reap() {
	// The status contains nothing that the log does not.
	_ = s.cmd.Wait()
	_ = s.alive.Close()
	s.cmd, s.alive = nil, nil
	s.guard.running(0)
}

// URI returns the URI of a database of this server, for its superuser. The host is the one that the
// server listens on.
func (s *Server) URI(database string) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.uri(database)
}

func (s *Server) uri(database string) string {
	user := url.User("postgres")
	if s.opts.Password != "" {
		user = url.UserPassword("postgres", s.opts.Password)
	}
	host := s.opts.Host
	if ip := net.ParseIP(host); host == "*" || ip != nil && ip.IsUnspecified() {
		host = "127.0.0.1"
	}
	u := url.URL{
		Scheme: "postgres", User: user, Host: net.JoinHostPort(host, strconv.Itoa(s.port)),
		Path: "/" + database, RawQuery: "sslmode=disable",
	}
	return u.String()
}

// Port returns the server's TCP port. It stays the same over restarts.
func (s *Server) Port() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.port
}

// PID returns the postmaster's process ID, or 0 while the server is stopped.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return 0
	}
	return s.cmd.Process.Pid
}

// DataDir returns the cluster's data folder.
func (s *Server) DataDir() string { return filepath.Join(s.dir, "data") }

// BinDir returns the folder of the server's programs.
func (s *Server) BinDir() string { return s.binDir }

// Version returns the server's version, such as "15.14".
func (s *Server) Version() string { return s.version }

// Logs returns the server's log since the cluster was created.
func (s *Server) Logs() string { return s.logFrom(0) }

// Exec runs one statement as superuser in the database "postgres".
func (s *Server) Exec(ctx context.Context, query string, args ...any) error {
	return withDB(s.URI("postgres"), func(db *sql.DB) error {
		_, err := db.ExecContext(ctx, query, args...)
		return err
	})
}

// Set changes a setting of the running server by ALTER SYSTEM and a reload. Sessions apply it
// shortly after.
func (s *Server) Set(ctx context.Context, name, value string) error {
	if !settingName.MatchString(name) {
		return fmt.Errorf("pgserver: invalid setting %q", name)
	}
	if err := s.Exec(ctx, "ALTER SYSTEM SET "+name+" = "+pq.QuoteLiteral(value)); err != nil {
		return err
	}
	return s.Exec(ctx, "SELECT pg_reload_conf()")
}

// CreateDatabase creates an empty database with a unique name and returns its URI.
func (s *Server) CreateDatabase(ctx context.Context, prefix string) (string, error) {
	name := uniqueName(prefix)
	if err := createDatabase(ctx, s.URI("postgres"), name); err != nil {
		return "", err
	}
	return s.URI(name), nil
}

// command prepares one of PostgreSQL's programs to run as the server's account.
func (s *Server) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(s.binDir, program), args...)
	// This process's folder may be inaccessible to the account.
	cmd.Dir = s.dir
	cmd.Env = environment()
	s.runAs.apply(cmd)
	return cmd
}

// run runs one of PostgreSQL's programs to its end. No goroutine of it remains when it returns.
func (s *Server) run(ctx context.Context, program string, args ...string) error {
	cmd := s.command(program, args...)
	bound := exec.CommandContext(ctx, cmd.Path, cmd.Args[1:]...)
	bound.Dir, bound.Env, bound.SysProcAttr = cmd.Dir, cmd.Env, cmd.SysProcAttr
	bound.WaitDelay = 5 * time.Second
	out, err := bound.CombinedOutput()
	if err != nil {
		return fmt.Errorf("pgserver: %s: %w\n%s", program, err, tail(string(out)))
	}
	return nil
}

// environment returns this process's environment without the variables that would affect
// PostgreSQL's programs, and with messages in English, which launch reads.
func environment() []string {
	var env []string
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") && !strings.HasPrefix(v, "LANG") {
			env = append(env, v)
		}
	}
	return append(env, "LC_ALL=C")
}

func (s *Server) logFile() string { return filepath.Join(s.dir, "log") }

func (s *Server) logFrom(offset int64) string {
	f, err := os.Open(s.logFile())
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		return ""
	}
	text, _ := io.ReadAll(f)
	return string(text)
}

func (s *Server) copyLog() {
	if s.opts.Log == nil {
		return
	}
	text := s.logFrom(s.logRead)
	s.logRead += int64(len(text))
	_, _ = io.WriteString(s.opts.Log, text)
}

// tail shortens an error's text.
func tail(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-15):], "\n")
}

// freePort returns a port below those that systems assign to outgoing connections. A port among
// those could go to a client while the server restarts, and a client that retries on it may even
// connect to itself.
func freePort(host string) (int, error) {
	for range 200 {
		port := 15000 + mathrand.IntN(17000)
		l, err := net.Listen("tcp", net.JoinHostPort(listenHost(host), strconv.Itoa(port)))
		if err == nil {
			return port, l.Close()
		}
	}
	l, err := net.Listen("tcp", net.JoinHostPort(listenHost(host), "0"))
	if err != nil {
		return 0, fmt.Errorf("pgserver: no free port: %w", err)
	}
	return l.Addr().(*net.TCPAddr).Port, l.Close()
}

func listenHost(host string) string {
	if host == "*" {
		return ""
	}
	return host
}

func readVersion(ctx context.Context, binDir string) (string, error) {
	out, err := exec.CommandContext(ctx, filepath.Join(binDir, "postgres"), "--version").Output()
	if err != nil {
		return "", fmt.Errorf("pgserver: postgres --version: %w", err)
	}
	// The output looks like this: postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1).
	_, rest, _ := strings.Cut(string(out), ") ")
	version, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	return version, nil
}

func appendFile(name, text string) error {
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// connectTimeout bounds what contexts do not. lib/pq watches no context between dialing and the end
// of the login, and a frozen server accepts connections without ever responding.
const connectTimeout = 2 * time.Second

// withDB calls use with a single connection, which is closed when withDB returns.
func withDB(uri string, use func(*sql.DB) error) error {
	config, err := pq.NewConfig(uri)
	if err != nil {
		return err
	}
	config.ConnectTimeout = connectTimeout
	connector, err := pq.NewConnectorConfig(config)
	if err != nil {
		return err
	}
	db := sql.OpenDB(connector)
	db.SetMaxOpenConns(1)
	return errors.Join(use(db), db.Close())
}

func uniqueName(prefix string) string {
	random := make([]byte, 6)
	// Read never fails.
	_, _ = rand.Read(random)
	const maxName = 63
	prefix = prefix[:min(len(prefix), maxName-2*len(random)-1)]
	return prefix + "_" + hex.EncodeToString(random)
}

func createDatabase(ctx context.Context, uri, name string) error {
	return withDB(uri, func(db *sql.DB) error {
		_, err := db.ExecContext(ctx, "CREATE DATABASE "+pq.QuoteIdentifier(name))
		return err
	})
}
