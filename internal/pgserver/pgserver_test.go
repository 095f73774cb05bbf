//go:build unix

package pgserver

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// envOrphan makes this test binary start a server and wait to be killed.
const envOrphan = "PGSERVER_TEST_ORPHAN"

func TestMain(m *testing.M) {
	if os.Getenv(envOrphan) != "" {
		s, err := Start(context.Background(), Options{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(s.PID(), s.dir)
		select {}
	}
	goleak.VerifyTestMain(m)
}

// needPrograms skips a test if there are no server programs and the tests run against a foreign
// server. If there is no foreign server either, the test continues and fails.
func needPrograms(t *testing.T) {
	t.Helper()
	if _, err := FindBinDir(); err != nil && os.Getenv(EnvURI) != "" {
		t.Skip(err)
	}
}

func start(t *testing.T, opts Options) *Server {
	t.Helper()
	needPrograms(t)
	s, err := Start(t.Context(), opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// ask returns a query's only value as text.
func ask(t *testing.T, uri, query string) string {
	t.Helper()
	var answer string
	err := withDB(uri, func(db *sql.DB) error { return db.QueryRowContext(t.Context(), query).Scan(&answer) })
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return answer
}

func mustExec(t *testing.T, uri, query string) {
	t.Helper()
	err := withDB(uri, func(db *sql.DB) error {
		_, err := db.ExecContext(t.Context(), query)
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
}

func mustNot(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// skipWithout skips a test if the server programs came without pg_basebackup.
func skipWithout(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, ErrNoBinaries) {
		t.Skip(err)
	}
}

func exists(pid int) bool { return syscall.Kill(pid, 0) == nil }

func TestStockServer(t *testing.T) {
	t.Parallel()
	var log bytes.Buffer
	s := start(t, Options{Config: map[string]string{"max_connections": "23", "cluster_name": "it's mine"}, Log: &log})
	uri := s.URI("postgres")
	for setting, want := range map[string]string{
		"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on", "server_encoding": "UTF8",
		"max_connections": "23", "cluster_name": "it's mine", "data_directory": s.DataDir(),
		"port": fmt.Sprint(s.Port()),
	} {
		if got := ask(t, uri, "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if !strings.HasPrefix(ask(t, uri, "SHOW server_version"), s.Version()) || s.Version() == "" {
		t.Errorf("version %q", s.Version())
	}
	if !strings.Contains(log.String(), "ready to accept connections") {
		t.Errorf("log: %q", log.String())
	}
	mustNot(t, s.Set(t.Context(), "log_min_messages", "error"))
	// The server runs already.
	mustNot(t, s.Start(t.Context()))
}

func TestDatabasesAreSeparate(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	var uris [2]string
	for n := range uris {
		uri, err := s.CreateDatabase(t.Context(), "test")
		mustNot(t, err)
		mustExec(t, uri, "CREATE TABLE same_name ()")
		uris[n] = uri
	}
	if uris[0] == uris[1] {
		t.Error("twice the same database")
	}
}

func TestRestart(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	uri := s.URI("postgres")
	mustExec(t, uri, "CREATE TABLE kept (n int)")
	for n, restart := range []func() error{
		func() error { return s.Restart(t.Context(), Smart) },
		func() error { return s.Restart(t.Context(), Fast) },
		func() error { return s.Restart(t.Context(), Immediate) },
		func() error { return errors.Join(s.Kill(), s.Start(t.Context())) },
		func() error { return errors.Join(s.Stop(Fast), s.Stop(Fast), s.Start(t.Context())) },
	} {
		mustExec(t, uri, "INSERT INTO kept VALUES (1)")
		pid := s.PID()
		mustNot(t, restart())
		if s.PID() == pid || exists(pid) {
			t.Errorf("restart %d: process %d is still there", n, pid)
		}
		if got := ask(t, uri, "SELECT count(*) FROM kept"); got != fmt.Sprint(n+1) {
			t.Errorf("restart %d: %s rows", n, got)
		}
	}
	if err := s.Stop("gently"); err == nil {
		t.Error("an unknown mode was accepted")
	}
}

// A fast stop ends the sessions of clients.
func TestRestartEndsSessions(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	for _, mode := range []string{Fast, Immediate} {
		err := withDB(s.URI("postgres"), func(db *sql.DB) error {
			conn, err := db.Conn(t.Context())
			mustNot(t, err)
			defer func() { _ = conn.Close() }()
			mustNot(t, conn.PingContext(t.Context()))
			mustNot(t, s.Restart(t.Context(), mode))
			if conn.PingContext(t.Context()) == nil {
				t.Errorf("%s: the session has survived", mode)
			}
			return nil
		})
		mustNot(t, err)
	}
}

func TestKillLeavesNoBackend(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	err := withDB(s.URI("postgres"), func(db *sql.DB) error {
		conn, err := db.Conn(t.Context())
		mustNot(t, err)
		defer func() { _ = conn.Close() }()
		var pid int
		mustNot(t, conn.QueryRowContext(t.Context(), "SELECT pg_backend_pid()").Scan(&pid))
		// A busy backend would not notice that its postmaster has ended.
		busy := make(chan error)
		go func() {
			_, err := conn.ExecContext(t.Context(), "SELECT pg_sleep(60)")
			busy <- err
		}()
		mustNot(t, s.Kill())
		if err := <-busy; err == nil {
			t.Error("the query has succeeded")
		}
		mustNot(t, s.Start(t.Context()))
		return nil
	})
	mustNot(t, err)
}

func TestPassword(t *testing.T) {
	t.Parallel()
	const password = `p'w :/?#[]@%"\`
	s := start(t, Options{Password: password})
	mustExec(t, s.URI("postgres"), "SELECT 1")
	wrong := strings.Replace(s.URI("postgres"), "p%27w", "other", 1)
	err := withDB(wrong, func(db *sql.DB) error { return db.PingContext(t.Context()) })
	if err == nil || !strings.Contains(err.Error(), "password") {
		t.Errorf("a wrong password: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "password")); !errors.Is(err, os.ErrNotExist) {
		t.Error("the password file is still there")
	}
	standby, err := s.Standby(t.Context(), StandbyOptions{})
	skipWithout(t, err)
	mustNot(t, err)
	mustNot(t, standby.Close())
}

func TestStandbyAndPromote(t *testing.T) {
	t.Parallel()
	for _, synchronous := range []bool{false, true} {
		primary := start(t, Options{})
		standby, err := primary.Standby(t.Context(), StandbyOptions{
			Synchronous: synchronous, Config: map[string]string{"max_connections": "120"},
		})
		skipWithout(t, err)
		mustNot(t, err)
		t.Cleanup(func() { mustNot(t, standby.Close()) })
		if standby.Port() == primary.Port() || ask(t, standby.URI("postgres"), "SHOW max_connections") != "120" {
			t.Error("the standby has its primary's settings")
		}
		mustExec(t, primary.URI("postgres"), "CREATE TABLE copied ()")
		if synchronous {
			// A query on the standby needs changes that are replayed, not only flushed.
			mustExec(t, primary.URI("postgres"), "SET synchronous_commit = remote_apply; CREATE TABLE applied ()")
			ask(t, standby.URI("postgres"), "SELECT count(*) FROM applied")
		}
		if got := ask(t, standby.URI("postgres"), "SELECT pg_is_in_recovery()"); got != "true" {
			t.Errorf("in recovery: %s", got)
		}
		if synchronous {
			// A synchronous standby that has stopped delays commits until it is removed from the
			// list.
			mustNot(t, standby.Stop(Fast))
			ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
			// A canceled wait may count as success: the commit has happened on the primary and is
			// only not confirmed.
			_ = primary.Exec(ctx, "CREATE TABLE waits ()")
			if ctx.Err() == nil {
				t.Error("a commit did not wait for the synchronous standby")
			}
			cancel()
			mustNot(t, standby.Start(t.Context()))
		}
		mustNot(t, primary.Kill())
		mustNot(t, standby.Promote(t.Context()))
		mustExec(t, standby.URI("postgres"), "INSERT INTO copied DEFAULT VALUES")
	}
}

func TestFreeze(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	mustNot(t, s.Freeze())
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := s.Exec(ctx, "SELECT 1"); err == nil {
		t.Error("a frozen server answers")
	}
	mustNot(t, s.Thaw())
	mustNot(t, s.Exec(t.Context(), "SELECT 1"))
	// Close has to work on a frozen server.
	mustNot(t, s.Freeze())
}

func TestCloseLeavesNothing(t *testing.T) {
	t.Parallel()
	s := start(t, Options{})
	pids := append(children(s.PID()), s.PID(), s.guard.cmd.Process.Pid)
	mustNot(t, s.Close())
	for _, pid := range pids {
		if exists(pid) {
			t.Errorf("process %d is still there", pid)
		}
	}
	if _, err := os.Stat(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("folder %s is still there", s.dir)
	}
	mustNot(t, s.Close())
	if s.Start(t.Context()) == nil {
		t.Error("a closed server was started")
	}
	if s.Freeze() != ErrNotRunning || s.PID() != 0 {
		t.Error("a closed server runs")
	}
}

func TestSIGKILLLeavesNothing(t *testing.T) {
	t.Parallel()
	needPrograms(t)
	for _, frozen := range []bool{false, true} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), envOrphan+"=1")
		out, err := cmd.StdoutPipe()
		mustNot(t, err)
		mustNot(t, cmd.Start())
		line, err := bufio.NewReader(out).ReadString('\n')
		mustNot(t, err)
		var pid int
		var dir string
		if _, err := fmt.Sscan(line, &pid, &dir); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if frozen {
			mustNot(t, signalStop(pid))
			for _, child := range children(pid) {
				mustNot(t, signalStop(child))
			}
		}
		mustNot(t, cmd.Process.Kill())
		_ = cmd.Wait()
		deadline := time.Now().Add(20 * time.Second)
		for {
			_, err := os.Stat(dir)
			if errors.Is(err, os.ErrNotExist) && dead(pid) {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("frozen %v: server %d dead: %v; folder: %v", frozen, pid, dead(pid), err)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// dead returns true for a zombie, too: in a container there may be no process that reaps an orphan.
func dead(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err == nil && strings.Contains(string(stat), ") Z ") {
		return true
	}
	return !exists(pid)
}

func TestFailedStart(t *testing.T) {
	t.Parallel()
	needPrograms(t)
	_, err := Start(t.Context(), Options{Config: map[string]string{"shared_buffers": "a lot"}})
	if err == nil || !strings.Contains(err.Error(), "shared_buffers") {
		t.Errorf("a bad setting: %v", err)
	}
	_, err = Start(t.Context(), Options{Config: map[string]string{"a b": "c"}})
	if err == nil || !strings.Contains(err.Error(), "invalid setting") {
		t.Errorf("a bad name: %v", err)
	}
	_, err = Start(t.Context(), Options{BinDir: t.TempDir()})
	if err == nil {
		t.Error("an empty folder of programs")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err = Start(ctx, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("a done context: %v", err)
	}
}

func TestTakenPort(t *testing.T) {
	t.Parallel()
	needPrograms(t)
	port, err := freePort("127.0.0.1")
	mustNot(t, err)
	l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	mustNot(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err = Start(ctx, Options{Port: port})
	if !errors.Is(err, errPortTaken) {
		t.Errorf("taken for good: %v", err)
	}
	time.AfterFunc(time.Second, func() { _ = l.Close() })
	s := start(t, Options{Port: port})
	if s.Port() != port {
		t.Errorf("port %d, want %d", s.Port(), port)
	}
}

func TestListenOnAllAddresses(t *testing.T) {
	t.Parallel()
	s := start(t, Options{Host: "0.0.0.0", Password: "secret"})
	mustExec(t, s.URI("postgres"), "SELECT 1")
	addrs, err := net.InterfaceAddrs()
	mustNot(t, err)
	for _, addr := range addrs {
		if ip, ok := addr.(*net.IPNet); ok && ip.IP.To4() != nil {
			mustExec(t, strings.Replace(s.URI("postgres"), "127.0.0.1", ip.IP.String(), 1), "SELECT 1")
		}
	}
}

func TestFindBinDir(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(EnvBin, dir)
	if _, err := FindBinDir(); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("an empty folder: %v", err)
	}
	for _, program := range []string{"initdb", "postgres"} {
		mustNot(t, os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"), 0o755))
	}
	if got, err := FindBinDir(); err != nil || got != dir {
		t.Errorf("found %q, %v", got, err)
	}
	t.Setenv(EnvBin, "")
	t.Setenv("PATH", dir)
	if got, err := FindBinDir(); err != nil || got != dir {
		t.Errorf("by PATH: found %q, %v", got, err)
	}
}

func TestSharedOwn(t *testing.T) {
	needPrograms(t)
	t.Setenv(EnvURI, "")
	i, err := Shared(t.Context())
	mustNot(t, err)
	defer func() { mustNot(t, i.Close()) }()
	if !i.Own() || i.Server() == nil {
		t.Error("the server is not ours")
	}
	testInstance(t, i)
	mustNot(t, i.Restart(t.Context(), Fast))
	mustNot(t, i.Restart(t.Context(), Immediate))
	testInstance(t, i)
}

func TestSharedForeign(t *testing.T) {
	s := start(t, Options{Password: "se cret"})
	t.Setenv(EnvURI, s.URI("postgres"))
	t.Setenv(EnvRestart, "")
	i, err := Shared(t.Context())
	mustNot(t, err)
	defer func() { mustNot(t, i.Close()) }()
	if i.Own() || i.Server() != nil {
		t.Error("the server is ours")
	}
	testInstance(t, i)
	if err := i.Restart(t.Context(), Fast); !errors.Is(err, ErrCannotRestart) {
		t.Errorf("restart: %v", err)
	}

	called := filepath.Join(t.TempDir(), "called")
	t.Setenv(EnvRestart, "echo >>'"+called+"' with")
	i, err = Shared(t.Context())
	mustNot(t, err)
	mustNot(t, i.Restart(t.Context(), Immediate))
	if got, _ := os.ReadFile(called); string(got) != "with immediate\n" {
		t.Errorf("the command was called %q", got)
	}
	if i.Restart(t.Context(), Smart) == nil {
		t.Error("a smart restart of a foreign server")
	}
	t.Setenv(EnvRestart, "false")
	i, err = Shared(t.Context())
	mustNot(t, err)
	if err := i.Restart(t.Context(), Fast); err == nil || errors.Is(err, ErrCannotRestart) {
		t.Errorf("a failing command: %v", err)
	}

	// The error of a server that rejects the login is returned immediately, without its password.
	t.Setenv(EnvURI, strings.Replace(s.URI("postgres"), "se%20cret", "gue%20ss", 1))
	if _, err := Shared(t.Context()); err == nil || strings.Contains(err.Error(), "gue") {
		t.Errorf("a wrong password: %v", err)
	}
	t.Setenv(EnvURI, "host=somewhere password=guess")
	if _, err := Shared(t.Context()); err == nil || strings.Contains(err.Error(), "guess") {
		t.Errorf("not a URI: %v", err)
	}
}

// testInstance creates two databases and drops them, one with a session in it.
func testInstance(t *testing.T, i *Instance) {
	t.Helper()
	count := func() string {
		return ask(t, i.admin(), "SELECT count(*) FROM pg_database WHERE datname LIKE 'locker_test_%'")
	}
	one, dropOne, err := i.NewDatabase(t.Context())
	mustNot(t, err)
	_, dropTwo, err := i.NewDatabase(t.Context())
	mustNot(t, err)
	if got := count(); got != "2" {
		t.Errorf("%s databases", got)
	}
	mustNot(t, withDB(one, func(db *sql.DB) error {
		_, err := db.ExecContext(t.Context(), "CREATE TABLE t ()")
		dropOne()
		return err
	}))
	dropTwo()
	if got := count(); got != "0" {
		t.Errorf("%s databases are left", got)
	}
}
