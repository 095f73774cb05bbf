package locker

import (
	"io"
	"net"
	"net/url"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// cord is a network cable between a process and its server. While it is cut, all
// connections are closed and no new one is accepted for longer than a moment.
type cord struct {
	listener net.Listener
	target   string
	running  sync.WaitGroup

	mu      sync.Mutex // guards everything below
	severed bool
	conns   map[net.Conn]bool
}

func newCord(t testing.TB, uri string) *cord {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c := &cord{listener: l, target: u.Host, conns: map[net.Conn]bool{}}
	c.running.Go(c.accept)
	t.Cleanup(func() {
		_ = l.Close()
		c.cut()
		c.running.Wait()
	})
	return c
}

// uri returns a server's URI with the address of the cord.
func (c *cord) uri(t testing.TB, uri string) string {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	u.Host = c.listener.Addr().String()
	return u.String()
}

func (c *cord) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.severed = true
	for conn := range c.conns {
		_ = conn.Close()
	}
	clear(c.conns)
}

func (c *cord) mend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.severed = false
}

// keep reports whether the cord is whole. If so, conn is closed when it is cut.
func (c *cord) keep(conn net.Conn) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.severed {
		c.conns[conn] = true
	}
	return !c.severed
}

func (c *cord) accept() {
	for {
		client, err := c.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", c.target)
		if err != nil || !c.keep(client) || !c.keep(server) {
			_ = client.Close()
			if server != nil {
				_ = server.Close()
			}
			continue
		}
		pump := func(to, from net.Conn) {
			_, _ = io.Copy(to, from)
			_ = to.Close()
			_ = from.Close()
			c.mu.Lock()
			defer c.mu.Unlock()
			delete(c.conns, from)
		}
		c.running.Go(func() { pump(server, client) })
		c.running.Go(func() { pump(client, server) })
	}
}
