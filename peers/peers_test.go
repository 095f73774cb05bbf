package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	if text := os.Getenv(envChild); text != "" {
		os.Exit(runChild(text))
	}
	status := m.Run()
	for _, s := range started {
		if err := s.close(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
	}
	os.Exit(status)
}

var (
	startedMu sync.Mutex // guards started and failed
	started   = map[storeKind]store{}
	failed    = map[storeKind]error{}
)

// storeOf returns the store that all tests share.
func storeOf(t *testing.T, kind storeKind) store {
	t.Helper()
	startedMu.Lock()
	if started[kind] == nil && failed[kind] == nil {
		if s, err := startStore(context.Background(), kind, speedConnections); err != nil {
			failed[kind] = err
		} else {
			started[kind] = s
		}
	}
	s, err := started[kind], failed[kind]
	startedMu.Unlock()
	skipWithout(t, err)
	require.NoError(t, err)
	return s
}

// skipWithout skips a test whose server is not on this machine. The name of such a test has to
// contain Redis or etcd, because scripts/test recognizes it by that.
func skipWithout(t *testing.T, err error) {
	t.Helper()
	if errors.Is(err, errNoProgram) {
		t.Skip(err)
	}
}

// eachPeer runs a test for every peer that can be measured.
func eachPeer(t *testing.T, test func(t *testing.T, p *peer, s store)) {
	for _, p := range peers() {
		if p.LeftOut != "" {
			continue
		}
		program, _, _ := strings.Cut(string(p.store), ",")
		t.Run(program+"/"+p.ID, func(t *testing.T) {
			t.Parallel()
			test(t, p, storeOf(t, p.store))
		})
	}
}

func contextOf(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

func opened(t *testing.T, p *peer, s store, o options) client {
	t.Helper()
	c, err := p.open(context.Background(), s.uri(s.address()), o)
	require.NoError(t, err)
	t.Cleanup(func() { assert.NoError(t, c.Close()) })
	return c
}

// TestAdapters tests that every adapter locks, excludes, refreshes and releases.
func TestAdapters(t *testing.T) {
	eachPeer(t, func(t *testing.T, p *peer, s store) {
		o := options{TTL: 2 * time.Second, Keep: true, Connections: 4}
		a, b := opened(t, p, s, o), opened(t, p, s, o)
		ctx := contextOf(t, time.Minute)
		first, err := a.lock(ctx, 1)
		require.NoError(t, err)
		_, err = b.try(ctx, 1)
		require.ErrorIs(t, err, errHeld)
		other, err := b.try(ctx, 2)
		require.NoError(t, err, "another key is free")
		require.NoError(t, other.release(ctx))

		// A lease that is not refreshed has ended by then.
		time.Sleep(o.TTL + o.TTL/2)
		assert.True(t, first.alive(ctx))
		_, err = b.try(ctx, 1)
		require.ErrorIs(t, err, errHeld, "after the TTL")

		waiter := make(chan error, 1)
		var second hold
		go func() {
			var err error
			second, err = b.lock(ctx, 1)
			waiter <- err
		}()
		select {
		case err := <-waiter:
			t.Fatal("two hold the lock", err)
		case <-time.After(300 * time.Millisecond):
		}
		require.NoError(t, first.release(ctx))
		require.NoError(t, <-waiter)
		assert.True(t, second.alive(ctx))
		if first.token() != 0 {
			assert.Greater(t, second.token(), first.token())
		}
		require.NoError(t, second.release(ctx))
	})
}

// TestKilled tests that the lock of a process that is killed by SIGKILL becomes free.
func TestKilled(t *testing.T) {
	eachPeer(t, func(t *testing.T, p *peer, s store) {
		ctx := contextOf(t, time.Minute)
		o := options{TTL: 2 * time.Second, Keep: true, Connections: 4}
		holder, err := startChild(ctx, childSpec{Peer: p.ID, URI: s.uri(s.address()), Options: o, First: 3, Count: 2})
		require.NoError(t, err)
		alive, err := holder.ask(askAlive)
		assert.NoError(t, err)
		assert.Equal(t, []bool{true, true}, alive)
		c := opened(t, p, s, o)
		_, err = c.try(ctx, 4)
		assert.ErrorIs(t, err, errHeld)
		pid := holder.cmd.Process.Pid
		holder.kill()
		assert.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
		h, err := c.lock(ctx, 4)
		require.NoError(t, err)
		require.NoError(t, h.release(ctx))
	})
}

// TestChild tests that a child process releases when it is asked to, and ends with its parent.
func TestChild(t *testing.T) {
	s := storeOf(t, postgres)
	ctx := contextOf(t, time.Minute)
	spec := childSpec{Peer: "advisory", URI: s.uri(s.address()), Options: options{Connections: 4}, First: 10, Count: 3}
	c, err := startChild(ctx, spec)
	require.NoError(t, err)
	released, err := c.ask(askRelease)
	require.NoError(t, err)
	require.Equal(t, []bool{true, true, true}, released)
	// The end of the parent closes the input in the same way.
	require.NoError(t, c.in.Close())
	require.NoError(t, c.cmd.Wait())

	spec.Peer = "nonesuch"
	_, err = startChild(ctx, spec)
	require.ErrorContains(t, err, "unknown peer")
}

// TestStore tests that a server that is a process restarts with its data, and leaves nothing
// behind.
func TestStore(t *testing.T) {
	for _, kind := range []storeKind{etcd, redisAlwaysKind} {
		t.Run(string(kind), func(t *testing.T) {
			s, err := startStore(context.Background(), kind, speedConnections)
			skipWithout(t, err)
			require.NoError(t, err)
			process := s.(*processStore)
			// The cleanup runs after the clients are closed.
			t.Cleanup(func() {
				pid := process.cmd.Process.Pid
				require.NoError(t, s.close())
				assert.ErrorIs(t, syscall.Kill(pid, 0), syscall.ESRCH)
				assert.NoDirExists(t, process.dir)
			})
			version, _ := s.describe()
			assert.NotEmpty(t, version)
			p := peerByID(map[storeKind]string{etcd: "etcd", redisAlwaysKind: "redislock-always"}[kind])
			ctx := contextOf(t, time.Minute)
			c := opened(t, p, s, options{TTL: 30 * time.Second})
			h, err := c.lock(ctx, 1)
			require.NoError(t, err)
			for _, clean := range []bool{true, false} {
				require.NoError(t, s.stop(clean))
				require.NoError(t, s.start(ctx))
				_, err = opened(t, p, s, options{TTL: 30 * time.Second}).try(ctx, 1)
				require.ErrorIs(t, err, errHeld)
			}
			require.NoError(t, h.release(ctx))
		})
	}
}

// TestGuard tests that the server of a process that ends abruptly ends as well.
func TestGuard(t *testing.T) {
	dir, err := os.MkdirTemp("", "peers-guard-")
	require.NoError(t, err)
	g, err := newGuard(dir)
	require.NoError(t, err)
	cmd := exec.Command("sleep", "60")
	require.NoError(t, cmd.Start())
	g.running(cmd.Process.Pid)
	// dismiss closes the pipe, like the end of the process.
	require.NoError(t, g.dismiss())
	assert.Error(t, cmd.Wait(), "killed")
	assert.NoDirExists(t, dir)
}

// TestRelay tests that silence delays, and that refuse resets.
func TestRelay(t *testing.T) {
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = echo.Close() }()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	r, err := newRelay(echo.Addr().String())
	require.NoError(t, err)
	defer r.close()
	dial := func() net.Conn {
		c, err := net.Dial("tcp", r.address)
		require.NoError(t, err)
		require.NoError(t, c.SetDeadline(time.Now().Add(10*time.Second)))
		return c
	}
	say := func(c net.Conn) error {
		_, err := c.Write([]byte("x"))
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 1))
		}
		return err
	}
	old := dial()
	require.NoError(t, say(old))
	r.setSilent(true)
	done := make(chan error, 2)
	go func() { done <- say(old) }()
	young := dial()
	go func() { done <- say(young) }()
	select {
	case <-done:
		t.Fatal("something came through")
	case <-time.After(100 * time.Millisecond):
	}
	r.setSilent(false)
	require.NoError(t, <-done)
	require.NoError(t, <-done)
	assert.Equal(t, 2, r.connections())

	r.refuse()
	require.Error(t, say(old))
	require.Error(t, say(young))
	_, err = net.Dial("tcp", r.address)
	require.Error(t, err)
	require.NoError(t, r.admit())
	require.NoError(t, say(dial()))
}

// TestGuide tests that docs/peers.md and results.md show the results that are kept.
func TestGuide(t *testing.T) {
	r, err := load(defaultOut)
	require.NoError(t, err)
	require.NotEmpty(t, r.Runs)
	for _, name := range []string{guide, defaultOut + ".md"} {
		text, err := os.ReadFile(name)
		require.NoError(t, err)
		assert.True(t, strings.Contains(string(text), r.markdown()), "%s is not up to date: go run . -plot", name)
	}
	for _, p := range r.Runs[0].Peers {
		assert.NotNil(t, peerByID(p.ID), p.ID)
	}
}
