// Package fault contains the parts of a chaos run that are broken: servers, worker processes and
// the network between them.
package fault

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"regexp"
	"slices"
	"strconv"
	"sync"
	"time"
)

// Role is the purpose for which a provider uses a connection.
type Role int

// The roles.
const (
	Statements Role = iota // any other purpose, and connections whose purpose is not known yet
	Session                // has the advisory lock that shows that the process lives
	Listener
	roles
)

// A connection shows its role by one of its requests.
var (
	sessionSign  = regexp.MustCompile(`pg_(try_)?advisory_lock(_shared)?\s*\(`)
	listenerSign = regexp.MustCompile(`\bLISTEN\s`)
)

// Way is a direction through a proxy.
type Way int

// The ways.
const (
	ToServer Way = iota
	ToClient
	ways
)

// Shape describes how the network treats the connections of one role. Its zero value is a network
// without faults.
type Shape struct {
	Silent  [ways]bool    // nothing arrives, not even the end of a connection
	Latency time.Duration // each way
	Jitter  time.Duration // random additional latency
	Rate    int           // bytes per second each way, or 0 for no limit

	Odds   int      // one request of this number is affected as follows, or 0 for none
	Errors []string // the request gets one of these SQLSTATEs as its response, and the server never receives it
	Cut    bool     // its connection is cut, either before the server has received it or when the response has arrived
}

// Proxy is the network between one worker and one server. It reads the messages, so it knows the
// role of each connection, its backend, and where a request and its response end.
type Proxy struct {
	target  string
	address string
	running sync.WaitGroup

	mu       sync.Mutex // guards everything below
	turn     *sync.Cond // a shape has changed, or a connection was cut
	listener net.Listener
	effects  []*effect
	shapes   [roles]Shape // the result of all effects, one after the other
	conns    map[*conn]bool
	orphans  []net.Conn // backends that were swapped and still live
	refused  int        // how many calls of Refuse have had no Accept yet
	refusals []string   // the SQLSTATEs of which a login gets the last, or none if logins pass
	closed   bool
	requests int // of all clients so far
	last     int // the network goes silent before the next one, or 0 if it does not
}

// effect is one change of the network.
type effect struct {
	change   func(*Shape)
	affected []Role
}

// conn is one client's connection.
type conn struct {
	proxy   *Proxy
	client  net.Conn
	pipes   [ways]chan chunk
	over    chan struct{} // closed when the connection is cut
	startup []byte        // the client's first message, set before anything is read from the server

	// guarded by Proxy.mu
	server  net.Conn
	role    Role
	pid     int
	cut     bool
	pending int  // requests that the server has not finished
	status  byte // of the transaction, when the last one was finished, or 0 during the login
	doomed  bool // whether it is cut in place of the next response
}

// NewProxy returns a proxy that listens on a free port.
func NewProxy(target string) (*Proxy, error) {
	p := &Proxy{target: target, conns: map[*conn]bool{}}
	p.turn = sync.NewCond(&p.mu)
	for range 200 {
		// The port is not one that the system could assign to a client that retries.
		p.address = net.JoinHostPort("127.0.0.1", strconv.Itoa(15000+rand.IntN(17000)))
		if p.listen() == nil {
			return p, nil
		}
	}
	return nil, errors.New("no free port for a proxy")
}

// Address returns the address that clients connect to.
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

// Change changes the network for the connections of the given roles, or for all connections if no
// role is given. Changes that several faults make concurrently can be undone one by one.
func (p *Proxy) Change(change func(*Shape), affected ...Role) (undo func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(affected) == 0 {
		affected = []Role{Statements, Session, Listener}
	}
	e := &effect{change, affected}
	p.effects = append(p.effects, e)
	p.shapeLocked()
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.effects = slices.DeleteFunc(p.effects, func(o *effect) bool { return o == e })
		p.shapeLocked()
	}
}

func (p *Proxy) shapeLocked() {
	p.shapes = [roles]Shape{}
	for _, e := range p.effects {
		for _, r := range e.affected {
			e.change(&p.shapes[r])
		}
	}
	p.turn.Broadcast()
}

// SilentAfter makes the network go silent permanently, both ways, when clients have sent n more
// requests.
func (p *Proxy) SilentAfter(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = p.requests + n
}

// requestedLocked counts a request.
func (p *Proxy) requestedLocked() {
	if p.requests++; p.last > 0 && p.requests > p.last {
		for r := range p.shapes {
			p.shapes[r].Silent = [ways]bool{true, true}
		}
	}
}

// Refuse ends every connection and refuses new ones, until Accept has been called equally often.
func (p *Proxy) Refuse() {
	p.mu.Lock()
	p.refused++
	if p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
	p.mu.Unlock()
	p.Cut()
}

// Accept undoes Refuse.
func (p *Proxy) Accept() error {
	p.mu.Lock()
	p.refused--
	open := p.refused > 0 || p.listener != nil
	p.mu.Unlock()
	if open {
		return nil
	}
	return p.listen()
}

// RefuseLogins makes every login fail with a SQLSTATE, until AcceptLogins has been called equally
// often.
func (p *Proxy) RefuseLogins(code string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusals = append(p.refusals, code)
}

// AcceptLogins undoes RefuseLogins.
func (p *Proxy) AcceptLogins() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refusals = p.refusals[1:]
}

// Cut ends every connection.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.endLocked()
	}
}

// Backends returns the process IDs of the server's ends of the connections of the given roles, or
// of all connections if no role is given.
func (p *Proxy) Backends(affected ...Role) []int {
	p.mu.Lock()
	defer p.mu.Unlock()
	var pids []int
	for c := range p.conns {
		if c.is(affected) && c.status != 0 && c.pid != 0 && !c.cut {
			pids = append(pids, c.pid)
		}
	}
	return pids
}

// Swap gives the connections of the given roles new backends, as a pooler does with idle clients,
// and returns their number. A client does not notice. The old backends end, or, if they are kept,
// live until Disown.
func (p *Proxy) Swap(keep bool, affected ...Role) int {
	var idle []*conn
	p.mu.Lock()
	for c := range p.conns {
		if c.is(affected) {
			idle = append(idle, c)
		}
	}
	p.mu.Unlock()
	swapped := 0
	for _, c := range idle {
		// The connection has to become idle.
		for range 20 {
			if c.swap(keep) {
				swapped++
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return swapped
}

// Disown ends the backends that Swap has kept.
func (p *Proxy) Disown() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, o := range p.orphans {
		_ = o.Close()
	}
	p.orphans = nil
}

// Close ends everything.
func (p *Proxy) Close() {
	p.Refuse()
	p.Disown()
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
	c := &conn{proxy: p, client: client, server: server, over: make(chan struct{})}
	for to := range ways {
		c.pipes[to] = make(chan chunk, 4096)
	}
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
	go c.readClient()
	go c.readServer(server)
	go c.write(ToServer)
	go c.write(ToClient)
}

// chunk is data in flight. The last one has none.
type chunk struct {
	data []byte
	due  time.Time
}

// is reports whether the connection has one of the roles, or whether no role is given.
func (c *conn) is(affected []Role) bool {
	return len(affected) == 0 || slices.Contains(affected, c.role)
}

func (c *conn) endLocked() {
	if c.cut {
		return
	}
	c.cut = true
	close(c.over)
	_ = c.server.Close()
	_ = c.client.Close()
	delete(c.proxy.conns, c)
	c.proxy.turn.Broadcast()
}

func (c *conn) end() {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	c.endLocked()
}

// send puts data into the pipe.
func (c *conn) send(to Way, data []byte) {
	select {
	case c.pipes[to] <- chunk{data, time.Now().Add(c.latency())}:
	case <-c.over:
	}
}

// readMessage reads one message of the protocol. The first message has no kind.
func readMessage(r *bufio.Reader, kind bool) ([]byte, error) {
	size := 4
	if kind {
		size = 5
	}
	head, err := r.Peek(size)
	if err != nil {
		return nil, err
	}
	length := size - 4 + int(binary.BigEndian.Uint32(head[size-4:]))
	if length < size {
		return nil, errors.New("not PostgreSQL's protocol")
	}
	message := make([]byte, length)
	_, err = io.ReadFull(r, message)
	return message, err
}

// The codes that can be in place of a version in a client's first message.
const (
	cancelRequest = 80877102
	sslRequest    = 80877103
	gssRequest    = 80877104
)

// readClient returns when the connection ends.
func (c *conn) readClient() {
	defer c.proxy.running.Done()
	defer c.send(ToServer, nil)
	r := bufio.NewReaderSize(c.client, 16<<10)
	first, err := readMessage(r, false)
	for err == nil && len(first) == 8 && (code(first) == sslRequest || code(first) == gssRequest) {
		c.send(ToClient, []byte("N"))
		first, err = readMessage(r, false)
	}
	if err != nil || len(first) < 8 {
		return
	}
	c.proxy.mu.Lock()
	c.startup = first
	c.proxy.requestedLocked()
	refusals := c.proxy.refusals
	c.proxy.mu.Unlock()
	if len(refusals) > 0 && code(first) != cancelRequest {
		c.send(ToClient, failure("FATAL", refusals[len(refusals)-1]))
		c.send(ToClient, nil)
		// The writer ends the connection when the client has the response.
		<-c.over
		return
	}
	c.send(ToServer, first)

	// A request is held until it is complete, so that it can be withheld from the server as a
	// whole.
	var request []byte
	whole := true
	for {
		message, err := readMessage(r, true)
		if err != nil {
			return
		}
		request = append(request, message...)
		switch message[0] {
		case 'P', 'B', 'D', 'E', 'C': // the steps before a Sync
			continue
		case 'Q', 'S', 'F':
			if !c.request(request, whole) {
				return
			}
			whole = true
		case 'p': // a password
			c.send(ToServer, request)
		default: // a flush, data to copy, the end
			c.send(ToServer, request)
			whole = message[0] != 'H'
		}
		request = nil
	}
}

func code(first []byte) uint32 { return binary.BigEndian.Uint32(first[4:]) }

// request forwards a request, unless a fault affects it. It returns false if the connection was
// cut.
func (c *conn) request(request []byte, whole bool) bool {
	p := c.proxy
	p.mu.Lock()
	p.requestedLocked()
	switch {
	case listenerSign.Match(request):
		c.role = Listener
	case sessionSign.Match(request):
		c.role = Session
	}
	s := p.shapes[c.role]
	hit := s.Odds > 0 && rand.IntN(s.Odds) == 0
	if hit && len(s.Errors) > 0 && whole && c.pending == 0 && c.status == 'I' {
		p.mu.Unlock()
		c.send(ToClient, append(failure("ERROR", s.Errors[rand.IntN(len(s.Errors))]), "Z\x00\x00\x00\x05I"...))
		return true
	}
	if hit && s.Cut {
		if rand.IntN(2) == 0 {
			c.endLocked()
			p.mu.Unlock()
			return false
		}
		c.doomed = true
	}
	c.pending++
	p.mu.Unlock()
	c.send(ToServer, request)
	return true
}

// failure returns an error message of a server. The severity for people is in another language.
func failure(severity, code string) []byte {
	translated := map[string]string{"FATAL": "ВАЖНО", "ERROR": "ОШИБКА"}[severity]
	body := "S" + translated + "\x00V" + severity + "\x00C" + code + "\x00Mchaos: not now\x00\x00"
	return append(binary.BigEndian.AppendUint32([]byte{'E'}, uint32(4+len(body))), body...)
}

// readServer reads the messages of one backend. It returns when the connection ends, or when the
// client gets another backend.
func (c *conn) readServer(server net.Conn) {
	defer c.proxy.running.Done()
	r := bufio.NewReaderSize(server, 16<<10)
	var said []byte
	for {
		message, err := readMessage(r, true)
		if err != nil {
			c.proxy.mu.Lock()
			current := c.server == server
			c.proxy.mu.Unlock()
			if current {
				if len(said) > 0 {
					c.send(ToClient, said)
				}
				c.send(ToClient, nil)
			}
			return
		}
		said = append(said, message...)
		finished, doomed := c.heard(message)
		switch {
		case doomed && finished:
			c.end()
			return
		case doomed:
			said = nil
		case finished || r.Buffered() == 0:
			c.send(ToClient, said)
			said = nil
		}
	}
}

// heard processes a message of the server. It reports whether the message finishes a request, and
// whether the client must not get it.
func (c *conn) heard(message []byte) (finished, doomed bool) {
	c.proxy.mu.Lock()
	defer c.proxy.mu.Unlock()
	switch {
	case message[0] == 'K' && len(message) >= 9:
		c.pid = int(binary.BigEndian.Uint32(message[5:]))
	case message[0] == 'Z' && len(message) >= 6:
		finished = true
		if c.status != 0 {
			c.pending--
		}
		c.status = message[5]
	}
	return finished, c.doomed
}

// swap gives the client another backend, if it is idle.
func (c *conn) swap(keep bool) bool {
	p := c.proxy
	idle := func() bool { return c.pending == 0 && c.status == 'I' && !c.cut && !p.closed }
	p.mu.Lock()
	ok, startup := idle(), c.startup
	p.mu.Unlock()
	if !ok {
		return false
	}
	server, pid, err := login(p.target, startup)
	if err != nil {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !idle() {
		_ = server.Close()
		return false
	}
	old := c.server
	c.server, c.pid = server, pid
	p.running.Add(1)
	go c.readServer(server)
	if keep {
		p.orphans = append(p.orphans, old)
		// The deadline ends the backend's reader.
		_ = old.SetReadDeadline(time.Now())
	} else {
		_, _ = old.Write([]byte("X\x00\x00\x00\x04"))
		_ = old.Close()
	}
	return true
}

// login opens a connection with a client's first message, on a server that asks for no password.
func login(target string, startup []byte) (server net.Conn, pid int, err error) {
	if server, err = net.DialTimeout("tcp", target, 2*time.Second); err != nil {
		return nil, 0, err
	}
	_ = server.SetDeadline(time.Now().Add(2 * time.Second))
	_, err = server.Write(startup)
	// Nothing follows the last message, so nothing is left in the buffer.
	for r := bufio.NewReader(server); err == nil; {
		var message []byte
		if message, err = readMessage(r, true); err != nil {
			break
		}
		switch message[0] {
		case 'E':
			err = errors.New("the login was refused")
		case 'K':
			pid = int(binary.BigEndian.Uint32(message[5:]))
		case 'Z':
			return server, pid, server.SetDeadline(time.Time{})
		}
	}
	_ = server.Close()
	return nil, 0, err
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

// write returns when the connection ends. With the last chunk, it ends the connection.
func (c *conn) write(to Way) {
	defer c.proxy.running.Done()
	defer c.end()
	for {
		select {
		case chunk := <-c.pipes[to]:
			if chunk.data == nil {
				c.await(to)
				return
			}
			if !c.forward(to, chunk) {
				return
			}
		case <-c.over:
			return
		}
	}
}

func (c *conn) forward(to Way, chunk chunk) bool {
	time.Sleep(time.Until(chunk.due))
	data := chunk.data
	for len(data) > 0 {
		end := c.await(to)
		if end == nil {
			return false
		}
		n := len(data)
		if rate := c.shape().Rate; rate > 0 {
			n = min(n, max(1, rate/10))
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
			if end = c.await(to); end == nil {
				return false
			}
		}
		if _, err := end.Write(data[:n]); err != nil {
			return false
		}
		data = data[n:]
	}
	return true
}

// await blocks while the way is silent, and returns its destination. It returns nil if the
// connection was cut.
func (c *conn) await(to Way) net.Conn {
	p := c.proxy
	p.mu.Lock()
	defer p.mu.Unlock()
	for !c.cut && !p.closed && p.shapes[c.role].Silent[to] {
		p.turn.Wait()
	}
	switch {
	case c.cut || p.closed:
		return nil
	case to == ToServer:
		return c.server
	}
	return c.client
}
