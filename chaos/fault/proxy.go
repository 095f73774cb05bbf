// Package fault has what a chaos run breaks: servers, worker processes and the
// network between them.
package fault

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"
)

// Role is what a provider uses a connection for.
type Role int

// The roles.
const (
	Session Role = iota // holds the locks
	Listener
	roles
)

// Way is a direction through a proxy.
type Way int

// The ways.
const (
	ToServer Way = iota
	ToClient
	ways
)

// Shape is how the network treats the connections of one role.
type Shape struct {
	Silent  [ways]bool    // nothing arrives, not even the end of a connection
	Latency time.Duration // each way
	Jitter  time.Duration // more of it, at random
	Rate    int           // bytes a second each way; 0: no limit
}

// Proxy is the network between one worker and one server. It knows the
// connections' roles and their backends by reading along.
type Proxy struct {
	target  string
	address string
	running sync.WaitGroup

	mu       sync.Mutex // guards everything below
	turn     *sync.Cond // a shape has changed, or a connection was cut
	listener net.Listener
	shapes   [roles]Shape
	conns    map[*conn]bool
	closed   bool
	requests int // of all clients so far
	last     int // the network goes silent before the next one; 0: it does not
}

type conn struct {
	proxy *Proxy
	ends  [ways]net.Conn // the server's end, the client's end

	// guarded by Proxy.mu
	role  Role
	known bool // the role is certain
	pid   int
	cut   bool
}

// NewProxy listens at a free port.
func NewProxy(target string) (*Proxy, error) {
	p := &Proxy{target: target, conns: map[*conn]bool{}}
	p.turn = sync.NewCond(&p.mu)
	for range 200 {
		// Not a port that the system could hand out to a client that retries.
		p.address = net.JoinHostPort("127.0.0.1", strconv.Itoa(15000+rand.IntN(17000)))
		if p.listen() == nil {
			return p, nil
		}
	}
	return nil, errors.New("no free port for a proxy")
}

// Address is where clients connect to.
func (p *Proxy) Address() string { return p.address }

func (p *Proxy) listen() error {
	l, err := net.Listen("tcp", p.address)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener = l
	p.running.Add(1)
	go p.accept(l)
	return nil
}

// Change changes the network for the connections of the given roles.
func (p *Proxy) Change(change func(*Shape), affected ...Role) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range affected {
		change(&p.shapes[r])
	}
	p.turn.Broadcast()
}

// SilentAfter makes the network go silent, both ways, when clients have sent n
// more requests.
func (p *Proxy) SilentAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = p.requests + n
}

// requested counts a request.
func (p *Proxy) requested() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.requests++; p.last > 0 && p.requests > p.last {
		for r := range p.shapes {
			p.shapes[r].Silent = [ways]bool{true, true}
		}
	}
}

// Refuse ends every connection and refuses new ones, until Accept.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
	for c := range p.conns {
		c.endLocked()
	}
}

// Accept ends Refuse.
func (p *Proxy) Accept() error {
	p.mu.Lock()
	open := p.listener != nil
	p.mu.Unlock()
	if open {
		return nil
	}
	return p.listen()
}

// Backends answers the process ids of the server's ends of the connections.
func (p *Proxy) Backends(role Role) []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	var pids []int
	for c := range p.conns {
		if c.known && c.role == role && c.pid != 0 && !c.cut {
			pids = append(pids, c.pid)
		}
	}
	return pids
}

// Close ends everything.
func (p *Proxy) Close() {
	p.Refuse()
	p.mu.Lock()
	p.closed = true
	p.turn.Broadcast()
	p.mu.Unlock()
	p.running.Wait()
}

func (p *Proxy) accept(l net.Listener) {
	defer p.running.Done()
	for {
		client, err := l.Accept()
		if err != nil {
			return
		}
		p.running.Add(1)
		go p.connect(client)
	}
}

func (p *Proxy) connect(client net.Conn) {
	defer p.running.Done()
	server, err := net.DialTimeout("tcp", p.target, 2*time.Second)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &conn{proxy: p, ends: [ways]net.Conn{ToServer: server, ToClient: client}}
	p.mu.Lock()
	refused := p.closed || p.listener == nil
	if !refused {
		p.conns[c] = true
		p.running.Add(2 * int(ways))
	}
	p.mu.Unlock()
	if refused {
		_ = client.Close()
		_ = server.Close()
		return
	}
	for to := range ways {
		chunks := make(chan chunk, 4096)
		go c.read(to, chunks)
		go c.write(to, chunks)
	}
}

// chunk is data under way.
type chunk struct {
	data []byte
	due  time.Time
}

func (c *conn) endLocked() {
	c.cut = true
	_ = c.ends[ToServer].Close()
	_ = c.ends[ToClient].Close()
	delete(c.proxy.conns, c)
	c.proxy.turn.Broadcast()
}

// read ends when the connection does. Closing chunks tells the writer.
func (c *conn) read(to Way, chunks chan<- chunk) {
	defer c.proxy.running.Done()
	defer close(chunks)
	startup := true
	var head []byte // of what the server says until it is ready
	buf := make([]byte, 16<<10)
	for {
		n, err := c.ends[1-to].Read(buf)
		if n > 0 {
			data := bytes.Clone(buf[:n])
			if to == ToServer {
				c.proxy.requested()
			}
			switch {
			case to == ToServer && startup:
				startup = false // the startup message has no kind
			case to == ToServer:
				c.learnRole(data)
			case startup:
				head = append(head, data...)
				startup = !c.learnBackend(head)
			}
			chunks <- chunk{data, time.Now().Add(c.latency())}
		}
		if err != nil {
			return
		}
	}
}

// learnRole looks at the client's first request.
func (c *conn) learnRole(data []byte) {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	if c.known || data[0] == 'p' { // p: a password
		return
	}
	c.known = true
	if bytes.Contains(data, []byte("LISTEN ")) {
		c.role = Listener
	}
}

// learnBackend looks for the message that names the backend; true means that the
// login is over.
func (c *conn) learnBackend(head []byte) bool {
	for len(head) >= 5 {
		size := 1 + int(binary.BigEndian.Uint32(head[1:]))
		if size < 5 || len(head) < size {
			return size < 5
		}
		switch head[0] {
		case 'K':
			c.proxy.mu.Lock()
			c.pid = int(binary.BigEndian.Uint32(head[5:]))
			c.proxy.mu.Unlock()
		case 'Z':
			return true
		}
		head = head[size:]
	}
	return false
}

func (c *conn) shape() Shape {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	return c.proxy.shapes[c.role]
}

func (c *conn) latency() time.Duration {
	s := c.shape()
	d := s.Latency
	if s.Jitter > 0 {
		d += rand.N(s.Jitter)
	}
	return d
}

// write ends the connection when there is nothing more to come.
func (c *conn) write(to Way, chunks <-chan chunk) {
	defer c.proxy.running.Done()
	failed := false
	for chunk := range chunks {
		if failed {
			continue // the reader must not block
		}
		failed = !c.forward(to, chunk)
		if failed {
			c.end()
		}
	}
	if !failed {
		c.await(to)
		c.end()
	}
}

func (c *conn) end() {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	c.endLocked()
}

func (c *conn) forward(to Way, chunk chunk) bool {
	time.Sleep(time.Until(chunk.due))
	data := chunk.data
	for len(data) > 0 {
		if !c.await(to) {
			return false
		}
		n := len(data)
		if rate := c.shape().Rate; rate > 0 {
			n = min(n, max(1, rate/10))
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
			if !c.await(to) {
				return false
			}
		}
		if _, err := c.ends[to].Write(data[:n]); err != nil {
			return false
		}
		data = data[n:]
	}
	return true
}

// await blocks while the way is silent; false means that the connection was cut.
func (c *conn) await(to Way) bool {
	p := c.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	for !c.cut && !p.closed && p.shapes[c.role].Silent[to] {
		p.turn.Wait()
	}
	return !c.cut && !p.closed
}
