package fault

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// backends is a server that responds to each query with the number of the backend and the query's
// text. It counts the queries.
type backends struct {
	address string
	seen    atomic.Int64 // queries
	ended   chan int     // backends whose client has disconnected
}

func newBackends(t *testing.T) *backends {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	b := &backends{address: l.Addr().String(), ended: make(chan int, 100)}
	// The goroutine ends with the listener.
	go func() {
		for pid := 1; ; pid++ {
			c, err := l.Accept()
			if err != nil {
				return
			}
			// The goroutine ends with the connection.
			go b.serve(c, pid)
		}
	}()
	return b
}

func (b *backends) serve(c net.Conn, pid int) {
	defer func() { b.ended <- pid }()
	defer func() { _ = c.Close() }()
	r := bufio.NewReader(c)
	if _, err := readMessage(r, false); err != nil {
		return
	}
	ready := message('Z', "I")
	welcome := append(message('R', "\x00\x00\x00\x00"), message('K', string(binary.BigEndian.AppendUint32(nil, uint32(pid)))+"\x00\x00\x00\x01")...)
	if _, err := c.Write(append(welcome, ready...)); err != nil {
		return
	}
	for {
		m, err := readMessage(r, true)
		if err != nil || m[0] == 'X' {
			return
		}
		if m[0] != 'Q' && m[0] != 'S' {
			continue
		}
		b.seen.Add(1)
		text := "sync"
		if m[0] == 'Q' {
			text = strings.TrimRight(string(m[5:]), "\x00")
		}
		if _, err := c.Write(append(message('C', fmt.Sprintf("%d:%s\x00", pid, text)), ready...)); err != nil {
			return
		}
	}
}

func message(kind byte, body string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{kind}, uint32(4+len(body))), body...)
}

// client is a client of a proxy.
type client struct {
	t *testing.T
	net.Conn
	r *bufio.Reader
}

// dial connects and sends the first message.
func dial(t *testing.T, p *Proxy) *client {
	t.Helper()
	conn, err := net.Dial("tcp", p.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	c := &client{t, conn, bufio.NewReader(conn)}
	c.send([]byte("\x00\x00\x00\x12\x00\x03\x00\x00user\x00app\x00\x00"))
	return c
}

// logIn connects like dial and requires that the login succeeds.
func logIn(t *testing.T, p *Proxy) *client {
	t.Helper()
	c := dial(t, p)
	if reply, err := c.hear(5 * time.Second); err != nil || reply != "" {
		t.Fatal(reply, err)
	}
	return c
}

func (c *client) send(data []byte) {
	c.t.Helper()
	if _, err := c.Write(data); err != nil {
		c.t.Fatal(err)
	}
}

// hear reads up to the end of a response, and returns its tag or its SQLSTATE.
func (c *client) hear(limit time.Duration) (reply string, err error) {
	_ = c.SetReadDeadline(time.Now().Add(limit))
	for {
		m, err := readMessage(c.r, true)
		if err != nil {
			return reply, err
		}
		switch m[0] {
		case 'C':
			reply = strings.TrimRight(string(m[5:]), "\x00")
		case 'E':
			_, after, _ := strings.Cut(string(m), "\x00C")
			reply = after[:5]
		case 'Z':
			return reply, nil
		}
	}
}

func (c *client) ask(text string) (string, error) {
	c.t.Helper()
	c.send(message('Q', text+"\x00"))
	return c.hear(5 * time.Second)
}

// want calls ask, and requires that the request succeeds.
func (c *client) want(text, reply string) {
	c.t.Helper()
	if got, err := c.ask(text); got != reply || err != nil {
		c.t.Fatalf("%s: %q %v, want %q", text, got, err, reply)
	}
}

func newProxy(t *testing.T, target string) *Proxy {
	t.Helper()
	p, err := NewProxy(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

const lockText = "SELECT pg_advisory_lock(7)"

func TestProxyShapes(t *testing.T) {
	p := newProxy(t, newBackends(t).address)
	session := logIn(t, p)
	session.want(lockText, "1:"+lockText)
	listener := logIn(t, p)
	listener.want("LISTEN x", "2:LISTEN x")
	statement := logIn(t, p)
	statement.want("SELECT 1", "3:SELECT 1")

	for role, want := range map[Role]int{Session: 1, Listener: 2, Statements: 3} {
		if pids := p.Backends(role); len(pids) != 1 || pids[0] != want {
			t.Errorf("role %d has backends %v, want %d", role, pids, want)
		}
	}
	if pids := p.Backends(); len(pids) != 3 {
		t.Error(pids)
	}

	undo := p.Change(func(s *Shape) { s.Silent[ToClient] = true }, Session)
	session.send(message('Q', "a\x00"))
	if reply, err := session.hear(200 * time.Millisecond); !os.IsTimeout(err) {
		t.Fatalf("%q %v through a silent network", reply, err)
	}
	listener.want("b", "2:b")                                   // only the session is silent
	p.Change(func(s *Shape) { s.Latency = time.Millisecond })() // does not undo the other change
	if reply, err := session.hear(50 * time.Millisecond); !os.IsTimeout(err) {
		t.Fatalf("%q %v through a silent network", reply, err)
	}
	undo()
	if reply, err := session.hear(5 * time.Second); reply != "1:a" {
		t.Fatalf("%q %v after the silence", reply, err)
	}

	undo = p.Change(func(s *Shape) { s.Latency = 100 * time.Millisecond }, Session)
	start := time.Now()
	session.want("c", "1:c")
	if took := time.Since(start); took < 200*time.Millisecond {
		t.Error("no latency:", took)
	}
	undo()
	undo = p.Change(func(s *Shape) { s.Rate = 100 }, Session)
	start = time.Now()
	session.want("0123456789", "1:0123456789") // about 16 bytes there and 25 back
	if took := time.Since(start); took < 300*time.Millisecond {
		t.Error("no limit of bandwidth:", took)
	}
	undo()

	p.Refuse()
	if _, err := listener.hear(5 * time.Second); err == nil || os.IsTimeout(err) {
		t.Fatal("the connection is still open:", err)
	}
	if c, err := net.Dial("tcp", p.Address()); err == nil {
		_ = c.Close()
		t.Fatal("not refused")
	}
	if err := p.Accept(); err != nil {
		t.Fatal(err)
	}
	logIn(t, p).want("d", "4:d")
}

func TestRefusedLogins(t *testing.T) {
	p := newProxy(t, newBackends(t).address)
	before := logIn(t, p)
	p.RefuseLogins("28P01")
	c := dial(t, p)
	if reply, err := c.hear(5 * time.Second); reply != "28P01" || err == nil || os.IsTimeout(err) {
		t.Fatalf("%q %v, want 28P01 and the end of the connection", reply, err)
	}
	// A client that is logged in is not affected.
	before.want("a", "1:a")
	p.AcceptLogins()
	logIn(t, p)
}

func TestErrorReplies(t *testing.T) {
	b := newBackends(t)
	p := newProxy(t, b.address)
	session, other := logIn(t, p), logIn(t, p)
	session.want(lockText, "1:"+lockText)
	other.want("a", "2:a")
	undo := p.Change(func(s *Shape) { s.Odds, s.Errors = 1, []string{"53300"} }, Session)
	seen := b.seen.Load()
	session.want("b", "53300")
	// A request of several messages gets one response.
	session.send(append(message('P', "s\x00SELECT 1\x00\x00\x00"), message('S', "")...))
	if reply, err := session.hear(5 * time.Second); reply != "53300" || err != nil {
		t.Fatal(reply, err)
	}
	if n := b.seen.Load() - seen; n != 0 {
		t.Errorf("the server has seen %d of the requests", n)
	}
	other.want("c", "2:c")
	undo()
	session.want("d", "1:d")
}

func TestCutReplies(t *testing.T) {
	b := newBackends(t)
	p := newProxy(t, b.address)
	p.Change(func(s *Shape) { s.Odds, s.Cut = 1, true })
	const clients = 20
	for range clients {
		c := logIn(t, p)
		if reply, err := c.ask("a"); err == nil || os.IsTimeout(err) || reply != "" {
			t.Fatalf("%q %v, want the end of the connection and nothing before it", reply, err)
		}
	}
	for range clients {
		<-b.ended
	}
	if n := b.seen.Load(); n == 0 || n == clients {
		t.Errorf("the server has seen %d of %d requests: want some", n, clients)
	}
}

func TestSwap(t *testing.T) {
	b := newBackends(t)
	p := newProxy(t, b.address)
	session, other := logIn(t, p), logIn(t, p)
	session.want(lockText, "1:"+lockText)
	if n := p.Swap(false, Session); n != 1 {
		t.Fatal(n)
	}
	session.want("a", "3:a")
	if pid := <-b.ended; pid != 1 {
		t.Fatalf("backend %d has ended, want 1", pid)
	}
	if pids := p.Backends(Session); len(pids) != 1 || pids[0] != 3 {
		t.Fatal(pids)
	}
	if n := p.Swap(true, Session); n != 1 {
		t.Fatal(n)
	}
	session.want("b", "4:b")
	select {
	case pid := <-b.ended:
		t.Fatalf("backend %d has ended", pid)
	default:
	}
	p.Disown()
	if pid := <-b.ended; pid != 3 {
		t.Fatalf("backend %d has ended, want 3", pid)
	}
	session.want("c", "4:c")
	other.want("d", "2:d")
	_ = session.Close()
	if pid := <-b.ended; pid != 4 {
		t.Fatalf("backend %d has ended, want 4", pid)
	}
	// A client that waits for a response keeps its backend.
	p.Change(func(s *Shape) { s.Silent[ToServer] = true }, Statements)
	other.send(message('Q', "e\x00"))
	for start := time.Now(); p.Swap(false, Statements) != 0; {
		if time.Since(start) > 5*time.Second {
			t.Fatal("swapped though it was busy")
		}
	}
}
