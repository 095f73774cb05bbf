package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/preemptable/locker/internal/pgserver"
)

// storeKind is a kind of server with its settings.
type storeKind string

const (
	postgres        storeKind = "PostgreSQL"
	etcd            storeKind = "etcd"
	redisAlwaysKind storeKind = "Redis, appendfsync always"
	redisStockKind  storeKind = "Redis, stock"
)

var storeKinds = []storeKind{postgres, etcd, redisAlwaysKind, redisStockKind}

// The variables that name the programs, if they are not to be searched in PATH. The variable for
// PostgreSQL is that of pgserver.
const (
	envRedis = "LOCKER_PEERS_REDIS_SERVER"
	envEtcd  = "LOCKER_PEERS_ETCD"
)

// errNoProgram means that a server's program is not on this machine.
var errNoProgram = errors.New("not found on this machine")

// store is a throwaway server that this process has started.
type store interface {
	address() string // host:port
	// uri returns the URI for a client that reaches the store at address.
	uri(address string) string
	describe() (version, settings string)
	// stop ends the server, keeping its data: cleanly, or by SIGKILL of all its processes.
	stop(clean bool) error
	start(ctx context.Context) error
	memory() int64 // bytes of all its processes, or 0 if that cannot be found out
	close() error
}

// startStore starts a server. PostgreSQL has to accept the given number of connections. The error
// matches errNoProgram if there is no program.
func startStore(ctx context.Context, kind storeKind, connections int) (store, error) {
	switch kind {
	case postgres:
		return startPostgres(ctx, connections)
	case etcd:
		return startProcess(ctx, newEtcd())
	default:
		return startProcess(ctx, newRedis(kind == redisAlwaysKind))
	}
}

type postgresStore struct {
	server   *pgserver.Server
	database string
}

func startPostgres(ctx context.Context, connections int) (store, error) {
	s := &postgresStore{}
	options := pgserver.Options{Config: map[string]string{"max_connections": fmt.Sprint(connections)}}
	var err error
	s.server, err = pgserver.Start(ctx, options)
	if errors.Is(err, pgserver.ErrNoBinaries) {
		return nil, fmt.Errorf("%w: %w", errNoProgram, err)
	}
	if err != nil {
		return nil, err
	}
	if s.database, err = s.server.CreateDatabase(ctx, "peers"); err != nil {
		return nil, errors.Join(err, s.server.Close())
	}
	return s, nil
}

func (s *postgresStore) address() string { return s.hostOf(s.database) }

func (s *postgresStore) hostOf(uri string) string {
	u, err := url.Parse(uri)
	if err != nil {
		return ""
	}
	return u.Host
}

func (s *postgresStore) uri(address string) string {
	return strings.Replace(s.database, s.address(), address, 1)
}

func (s *postgresStore) describe() (version, settings string) {
	return s.server.Version(), fmt.Sprintf("stock, but max_connections: %d, and %d with many held", speedConnections, faultConnections)
}

func (s *postgresStore) stop(clean bool) error {
	if clean {
		return s.server.Stop(pgserver.Fast)
	}
	return s.server.Kill()
}

func (s *postgresStore) start(ctx context.Context) error { return s.server.Start(ctx) }
func (s *postgresStore) memory() int64                   { return memoryOf(s.server.PID()) }
func (s *postgresStore) close() error                    { return s.server.Close() }

// program describes how a server that is a single process is run.
type program struct {
	name, env string
	ports     int
	args      func(dir string, ports []int) []string
	// answers returns the version of the server, or an error if it is not ready.
	answers  func(ctx context.Context, address string) (version string, err error)
	settings string
}

// processStore is a server that is one process in a temporary folder.
type processStore struct {
	program
	path, dir string
	ports     []int
	cmd       *exec.Cmd // nil while it is stopped
	guard     *guard
	version   string
}

const startTimeout = 20 * time.Second

func newRedis(always bool) program {
	p := program{
		name: "redis-server", env: envRedis, ports: 1, settings: "stock: appendonly no",
		args: func(dir string, ports []int) []string {
			return []string{"--bind", "127.0.0.1", "--port", fmt.Sprint(ports[0]), "--dir", dir}
		},
		answers: func(ctx context.Context, address string) (string, error) {
			redis.SetLogger(quiet{})
			c := redis.NewClient(&redis.Options{Addr: address, MaxRetries: -1})
			defer func() { _ = c.Close() }()
			text, err := c.Info(ctx, "server").Result()
			if err != nil {
				return "", err
			}
			if found := regexp.MustCompile(`(?m)^(redis|valkey)_version:(\S+)`).FindAllStringSubmatch(text, -1); len(found) > 0 {
				// Ping fails while the server loads its data.
				return found[len(found)-1][2], c.Ping(ctx).Err()
			}
			return "", errors.New("no version in INFO")
		},
	}
	if always {
		stock := p.args
		p.args = func(dir string, ports []int) []string {
			return append(stock(dir, ports), "--appendonly", "yes", "--appendfsync", "always")
		}
		p.settings = "appendonly yes, appendfsync always"
	}
	return p
}

func newEtcd() program {
	return program{
		name: "etcd", env: envEtcd, ports: 2, settings: "stock, one member",
		args: func(dir string, ports []int) []string {
			client, member := fmt.Sprintf("http://127.0.0.1:%d", ports[0]), fmt.Sprintf("http://127.0.0.1:%d", ports[1])
			return []string{
				"--name", "peers", "--data-dir", dir, "--log-level", "error",
				"--listen-client-urls", client, "--advertise-client-urls", client,
				"--listen-peer-urls", member, "--initial-advertise-peer-urls", member, "--initial-cluster", "peers=" + member,
			}
		},
		answers: func(ctx context.Context, address string) (string, error) {
			var health struct{ Health string }
			if err := getJSON(ctx, "http://"+address+"/health", &health); err != nil {
				return "", err
			}
			if health.Health != "true" {
				return "", errors.New("not healthy yet")
			}
			var version struct{ Etcdserver string }
			err := getJSON(ctx, "http://"+address+"/version", &version)
			return version.Etcdserver, err
		},
	}
}

func getJSON(ctx context.Context, url string, to any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	req.Close = true
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	return json.NewDecoder(resp.Body).Decode(to)
}

// startProcess creates the folder and starts the server. A server that could not be started leaves
// nothing behind.
func startProcess(ctx context.Context, p program) (store, error) {
	name := p.name
	if named := os.Getenv(p.env); named != "" {
		name = named
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w; install it or name it in %s", name, errNoProgram, p.env)
	}
	if path, err = filepath.Abs(path); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "peers-")
	if err != nil {
		return nil, err
	}
	s := &processStore{program: p, path: path, dir: dir}
	if s.guard, err = newGuard(dir); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	if s.ports, err = freePorts(p.ports); err != nil {
		return nil, errors.Join(err, s.close())
	}
	if err := s.start(ctx); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// freePorts returns ports that are not in use.
func freePorts(n int) (ports []int, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		// The listeners are closed only at the end, so that the ports differ.
		defer func() { _ = l.Close() }()
		ports = append(ports, l.Addr().(*net.TCPAddr).Port)
	}
	return ports, nil
}

func (s *processStore) address() string           { return fmt.Sprintf("127.0.0.1:%d", s.ports[0]) }
func (s *processStore) uri(address string) string { return address }

func (s *processStore) describe() (version, settings string) { return s.version, s.settings }

func (s *processStore) start(ctx context.Context) error {
	data := filepath.Join(s.dir, "data")
	if err := os.MkdirAll(data, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(s.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }()
	cmd := exec.Command(s.path, s.args(data, s.ports)...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = data, log, log
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + s.dir} // etcd reads settings from ETCD_*
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}            // ^C is meant for this process
	if err := cmd.Start(); err != nil {
		return err
	}
	s.cmd = cmd
	s.guard.running(cmd.Process.Pid)
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		attempt, cancel := context.WithTimeout(ctx, time.Second)
		version, err := s.answers(attempt, s.address())
		cancel()
		if err == nil {
			s.version = version
			return nil
		}
		if ctx.Err() != nil {
			text, _ := os.ReadFile(filepath.Join(s.dir, "log"))
			return fmt.Errorf("%s does not answer: %w; its log ends with: %s", s.name, err, text[max(0, len(text)-1000):])
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s *processStore) stop(clean bool) error {
	if s.cmd == nil {
		return nil
	}
	signal := syscall.SIGTERM
	if !clean {
		signal = syscall.SIGKILL
	}
	_ = s.cmd.Process.Signal(signal)
	late := time.AfterFunc(startTimeout, func() { _ = s.cmd.Process.Kill() })
	// The status is of no interest.
	_ = s.cmd.Wait()
	late.Stop()
	s.cmd = nil
	s.guard.running(0)
	return nil
}

func (s *processStore) memory() int64 {
	if s.cmd == nil {
		return 0
	}
	return memoryOf(s.cmd.Process.Pid)
}

func (s *processStore) close() error {
	err := s.stop(true)
	return errors.Join(err, os.RemoveAll(s.dir), s.guard.dismiss())
}
