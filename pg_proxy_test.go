package locker

import (
	"encoding/binary"
	"io"
	"net"
	"net/url"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// direction is the direction in which bytes flow through a proxy.
type direction int

const (
	toServer direction = iota
	toClient
)

// verdict is the decision of a proxy's filter about a message.
type verdict int

const (
	pass verdict = iota
	drop         // the message disappears
	cut          // the connection is closed on both sides
)

// proxy forwards PostgreSQL's messages between providers and a server. Its silence looks like a
// network that loses every packet: connections stay open, and nothing arrives any longer, not even
// the end of a connection.
type proxy struct {
	listener net.Listener
	target   string
	filter   func(c *proxied, to direction, kind byte, body []byte) verdict // nil passes everything
	running  sync.WaitGroup

	mu     sync.Mutex // guards everything below
	turn   *sync.Cond // silence has changed, or the proxy is closed
	silent [2]bool
	conns  map[*proxied]bool
	closed bool
}

// proxied is one connection through a proxy.
type proxied struct {
	ends   [2]net.Conn // indexed by direction: the server's end, the client's end
	silent [2]bool     // guarded by proxy.mu
	pid    int         // of the backend, once it is known (guarded by proxy.mu)
}

// newProxy returns a proxy that listens at address, or on a free port if address is empty. The
// proxy ends with the test.
func newProxy(t testing.TB, address, uri string, filter func(c *proxied, to direction, kind byte, body []byte) verdict) *proxy {
	t.Helper()
	target, err := url.Parse(uri)
	require.NoError(t, err)
	if address == "" {
		address = "127.0.0.1:0"
	}
	l, err := net.Listen("tcp", address)
	require.NoError(t, err)
	p := &proxy{listener: l, target: target.Host, filter: filter, conns: map[*proxied]bool{}}
	p.turn = sync.NewCond(&p.mu)
	p.running.Add(1)
	go p.accept()
	t.Cleanup(p.close)
	return p
}

// uri returns a server's URI with the address of the proxy.
func (p *proxy) uri(t testing.TB, uri string) string {
	t.Helper()
	return throughAddress(t, uri, p.listener.Addr().String())
}

func throughAddress(t testing.TB, uri, address string) string {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	u.Host = address
	q := u.Query()
	// The proxy has to read the messages.
	q.Set("sslmode", "disable")
	u.RawQuery = q.Encode()
	return u.String()
}

// silence stops the given directions of all connections, including those to come. Without a
// direction it restores the network.
func (p *proxy) silence(ways ...direction) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silent = [2]bool{}
	for _, way := range ways {
		p.silent[way] = true
	}
	p.turn.Broadcast()
}

// silenceBackend stops both directions of the connection to one backend.
func (p *proxy) silenceBackend(pid int) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		if c.pid == pid {
			c.silent = [2]bool{true, true}
			return true
		}
	}
	return false
}

func (p *proxy) close() {
	p.mu.Lock()
	p.closed = true
	_ = p.listener.Close()
	for c := range p.conns {
		c.close()
	}
	p.turn.Broadcast()
	p.mu.Unlock()
	p.running.Wait()
}

func (c *proxied) close() {
	_ = c.ends[toServer].Close()
	_ = c.ends[toClient].Close()
}

func (p *proxy) accept() {
	defer p.running.Done()
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		c := &proxied{ends: [2]net.Conn{toServer: server, toClient: client}}
		p.mu.Lock()
		if p.closed {
			p.mu.Unlock()
			c.close()
			return
		}
		p.conns[c] = true
		p.running.Add(2)
		p.mu.Unlock()
		go p.pump(c, toServer)
		go p.pump(c, toClient)
	}
}

// pump forwards one direction until the connection ends.
func (p *proxy) pump(c *proxied, to direction) {
	defer p.running.Done()
	from := c.ends[1-to]
	// The startup message has no kind.
	first := to == toServer
	for {
		message, err := readMessage(from, first)
		first = false
		verdict := pass
		if err == nil && p.filter != nil {
			verdict = p.filter(c, to, kindOf(message), message)
		}
		if err == nil && to == toClient && kindOf(message) == 'K' && len(message) >= 9 {
			p.mu.Lock()
			c.pid = int(binary.BigEndian.Uint32(message[5:]))
			p.mu.Unlock()
		}
		if verdict == drop {
			continue
		}
		if p.await(c, to) && err == nil && verdict == pass {
			if _, err = c.ends[to].Write(message); err == nil {
				continue
			}
		}
		c.close()
		p.mu.Lock()
		delete(p.conns, c)
		p.mu.Unlock()
		return
	}
}

// await blocks while the direction is silent. It returns false if the proxy is closed.
func (p *proxy) await(c *proxied, to direction) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for !p.closed && (p.silent[to] || c.silent[to]) {
		p.turn.Wait()
	}
	return !p.closed
}

// kindOf returns a message's kind. It returns 0 for the startup message, whose length always begins
// with that byte.
func kindOf(message []byte) byte { return message[0] }

// readMessage reads one message of PostgreSQL's protocol, including its header.
func readMessage(r io.Reader, startup bool) ([]byte, error) {
	head := 5
	if startup {
		head = 4
	}
	message := make([]byte, head, 512)
	if _, err := io.ReadFull(r, message); err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(message[head-4:])) - 4
	if size < 0 || size > 1<<26 {
		return nil, io.ErrUnexpectedEOF
	}
	message = append(message, make([]byte, size)...)
	_, err := io.ReadFull(r, message[head:])
	return message, err
}

// newPooler starts a pool in transaction mode, at its smallest, and returns its address. Every
// client has two server sessions, and each transaction goes to the other one. A lenient pool does
// not count a transaction that only prepares. The server must not ask for a password.
func newPooler(t testing.TB, uri string, lenient bool) string {
	t.Helper()
	target, err := url.Parse(uri)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	var running sync.WaitGroup
	var mu sync.Mutex // guards open
	var open []net.Conn
	track := func(c net.Conn, err error) net.Conn {
		if err != nil {
			return nil
		}
		mu.Lock()
		defer mu.Unlock()
		open = append(open, c)
		return c
	}
	running.Add(1)
	go func() {
		defer running.Done()
		for {
			client := track(l.Accept())
			if client == nil {
				return
			}
			servers := [2]net.Conn{track(net.Dial("tcp", target.Host)), track(net.Dial("tcp", target.Host))}
			running.Add(1)
			go func() {
				defer running.Done()
				pool(client, servers, lenient)
			}()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		mu.Lock()
		for _, c := range open {
			_ = c.Close()
		}
		mu.Unlock()
		running.Wait()
	})
	return l.Addr().String()
}

// pool serves one client until an error occurs.
func pool(client net.Conn, servers [2]net.Conn, lenient bool) {
	defer func() { _ = client.Close() }()
	for _, s := range servers {
		if s == nil {
			return
		}
		defer func() { _ = s.Close() }()
	}
	startup, err := readMessage(client, true)
	if err != nil {
		return
	}
	for i, to := range []io.Writer{client, io.Discard} {
		if _, err := servers[i].Write(startup); err != nil {
			return
		}
		if _, err := relayUntilReady(to, servers[i]); err != nil {
			return
		}
	}
	executed := false
	for turn := 0; ; {
		message, err := readMessage(client, false)
		if err != nil || kindOf(message) == 'X' {
			return
		}
		if _, err := servers[turn].Write(message); err != nil {
			return
		}
		kind := kindOf(message)
		executed = executed || kind == 'Q' || kind == 'E'
		if kind != 'Q' && kind != 'S' {
			continue
		}
		status, err := relayUntilReady(client, servers[turn])
		if err != nil {
			return
		}
		// Outside of a transaction, the next message goes to the other session.
		if status == 'I' && (executed || !lenient) {
			turn, executed = 1-turn, false
		}
	}
}

// relayUntilReady forwards a server's messages up to ReadyForQuery, and returns the transaction
// status of that message.
func relayUntilReady(to io.Writer, from io.Reader) (byte, error) {
	for {
		message, err := readMessage(from, false)
		if err != nil {
			return 0, err
		}
		if _, err := to.Write(message); err != nil {
			return 0, err
		}
		if kindOf(message) == 'Z' {
			return message[5], nil
		}
	}
}
