package locker

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fieldProxy is a proxy that can refuse logins, respond in the server's place, rewrite messages,
// and give a client another backend, as poolers and failovers do. It forwards whole messages of
// PostgreSQL's protocol, without TLS, and the server must not ask for a password.
type fieldProxy struct {
	listener net.Listener
	running  sync.WaitGroup

	mu     sync.Mutex // guards everything below
	target string
	hook   fieldHook
	refuse []byte // response to a login, or nil to let logins pass
	down   bool   // connections are closed before anything is read
	reset  string // runs on the backend after each statement, before the client gets the end of the response
	logins []time.Time
	conns  map[*fieldConn]bool
	closed bool
}

// fieldHook gets every message of both directions before it is forwarded, and returns the verdict
// and the message to forward. It is called from two goroutines per connection.
type fieldHook func(c *fieldConn, to direction, message []byte) (verdict, []byte)

// fieldConn is one connection through a fieldProxy.
type fieldConn struct {
	relay   *fieldProxy
	client  net.Conn
	startup []byte
	listens atomic.Bool // a LISTEN was sent on it
	mark    atomic.Bool // for hooks only
	dead    atomic.Bool // for hooks that make the connection silent

	mu      sync.Mutex // guards everything below, and writing to both ends
	server  net.Conn
	pid     int // of the backend
	idle    bool
	swallow int    // responses that the client does not get
	held    []byte // the message that the client gets after them
	closed  bool
}

// newFieldProxy starts a proxy to the server of a URI. It ends with the test.
func newFieldProxy(t testing.TB, uri string) *fieldProxy {
	t.Helper()
	target, err := url.Parse(uri)
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	r := &fieldProxy{listener: l, target: target.Host, conns: map[*fieldConn]bool{}}
	r.running.Add(1)
	go r.accept()
	t.Cleanup(r.close)
	return r
}

// uri returns a server's URI with the address of the proxy.
func (r *fieldProxy) uri(t testing.TB, uri string) string {
	t.Helper()
	return throughAddress(t, uri, r.listener.Addr().String())
}

// set changes the settings of the proxy.
func (r *fieldProxy) set(change func(r *fieldProxy)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change(r)
}

// refuseLogins makes the proxy respond to every login with an error, or lets logins pass again if
// the code is empty.
func (r *fieldProxy) refuseLogins(code, text string) {
	r.set(func(r *fieldProxy) {
		r.refuse = nil
		if code != "" {
			r.refuse = errorMessage("FATAL", code, text)
		}
	})
}

// loginsSince returns the number of attempts to log in.
func (r *fieldProxy) loginsSince(since time.Time) (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, at := range r.logins {
		if at.After(since) {
			n++
		}
	}
	return n
}

// open returns the connections that are logged in.
func (r *fieldProxy) open() (all []*fieldConn) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		all = append(all, c)
	}
	return all
}

// find returns a connection for which is holds, or nil.
func (r *fieldProxy) find(is func(c *fieldConn) bool) *fieldConn {
	for _, c := range r.open() {
		if is(c) {
			return c
		}
	}
	return nil
}

// listening returns the connection that listens, or nil.
func (r *fieldProxy) listening() *fieldConn {
	return r.find(func(c *fieldConn) bool { return c.listens.Load() })
}

// cutAll ends every connection on both sides.
func (r *fieldProxy) cutAll() {
	for _, c := range r.open() {
		c.close()
	}
}

func (r *fieldProxy) close() {
	r.mu.Lock()
	r.closed = true
	_ = r.listener.Close()
	r.mu.Unlock()
	r.cutAll()
	r.running.Wait()
}

func (r *fieldProxy) accept() {
	defer r.running.Done()
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		c := &fieldConn{relay: r, client: client}
		r.mu.Lock()
		r.conns[c] = true
		closed := r.closed
		r.running.Add(1)
		r.mu.Unlock()
		if closed {
			c.close()
		}
		// The goroutine ends with the connection.
		go func() {
			defer r.running.Done()
			c.serve()
		}()
	}
}

// serve forwards a connection until it ends.
func (c *fieldConn) serve() {
	defer c.close()
	r := c.relay
	r.mu.Lock()
	down := r.down
	r.mu.Unlock()
	if down {
		r.set(func(r *fieldProxy) { r.logins = append(r.logins, time.Now()) })
		return
	}
	startup, err := readMessage(c.client, true)
	if err != nil {
		return
	}
	const cancelRequest = 80877102
	cancels := len(startup) >= 8 && binary.BigEndian.Uint32(startup[4:]) == cancelRequest
	r.mu.Lock()
	target, refusal, hook := r.target, r.refuse, r.hook
	if !cancels {
		r.logins = append(r.logins, time.Now())
	}
	r.mu.Unlock()
	if refusal != nil && !cancels {
		_ = c.send(c.client, refusal)
		return
	}
	if hook != nil {
		if v, _ := hook(c, toServer, startup); v == cut {
			return
		}
	}
	server, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	c.mu.Lock()
	c.startup, c.server = startup, server
	closed := c.closed
	c.mu.Unlock()
	if closed {
		_ = server.Close()
		return
	}
	// The login gets no response.
	if c.dead.Load() {
		_, _ = readMessage(c.client, false)
		return
	}
	if err := c.send(server, startup); err != nil || cancels {
		return
	}
	r.mu.Lock()
	r.running.Add(1)
	r.mu.Unlock()
	// The goroutine ends with the connection.
	go func() {
		defer r.running.Done()
		defer c.close()
		c.pumpToClient()
	}()
	c.pumpToServer()
}

func (c *fieldConn) close() {
	c.mu.Lock()
	c.closed = true
	_ = c.client.Close()
	if c.server != nil {
		_ = c.server.Close()
	}
	c.mu.Unlock()
	c.relay.mu.Lock()
	delete(c.relay.conns, c)
	c.relay.mu.Unlock()
}

// send writes a message to one end. It has a deadline, because it may be called with mu locked.
func (c *fieldConn) send(to net.Conn, message []byte) error {
	// SetWriteDeadline fails only on a connection that has ended.
	_ = to.SetWriteDeadline(time.Now().Add(10 * time.Second))
	_, err := to.Write(message)
	return err
}

// apply calls the proxy's hook.
func (c *fieldConn) apply(to direction, message []byte) (verdict, []byte) {
	c.relay.mu.Lock()
	hook := c.relay.hook
	c.relay.mu.Unlock()
	if hook == nil {
		return pass, message
	}
	return hook(c, to, message)
}

func (c *fieldConn) pumpToServer() {
	for {
		message, err := readMessage(c.client, false)
		if err != nil {
			return
		}
		kind := kindOf(message)
		if (kind == 'Q' || kind == 'P') && isListen(message) {
			c.listens.Store(true)
		}
		v, message := c.apply(toServer, message)
		if v == cut {
			return
		}
		if v == drop {
			continue
		}
		c.mu.Lock()
		c.idle = false
		err = c.send(c.server, message)
		c.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (c *fieldConn) pumpToClient() {
	for {
		c.mu.Lock()
		server := c.server
		c.mu.Unlock()
		message, err := readMessage(server, false)
		if err != nil {
			c.mu.Lock()
			swapped := c.server != server
			c.mu.Unlock()
			if swapped {
				continue
			}
			return
		}
		if !c.forward(message) {
			return
		}
	}
}

// forward handles one message of the server. It reports whether the connection continues.
func (c *fieldConn) forward(message []byte) bool {
	kind := kindOf(message)
	c.mu.Lock()
	swallowing := c.swallow > 0
	if kind == 'K' && len(message) >= 9 {
		c.pid = int(binary.BigEndian.Uint32(message[5:]))
	}
	c.mu.Unlock()
	if swallowing && kind != 'A' {
		if kind != 'Z' {
			return true
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.swallow--
		if c.held == nil {
			return true
		}
		message, c.held = c.held, nil
		c.idle = true
		return c.send(c.client, message) == nil
	}
	v, message := c.apply(toClient, message)
	switch v {
	case drop:
		return true
	case cut:
		return false
	}
	c.relay.mu.Lock()
	reset := c.relay.reset
	c.relay.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if kind == 'Z' && message[5] == 'I' {
		if reset != "" {
			c.swallow++
			c.held = message
			return c.send(c.server, queryMessage(reset)) == nil
		}
		c.idle = true
	}
	return c.send(c.client, message) == nil
}

// answer sends messages to the client, as if they came from the server.
func (c *fieldConn) answer(messages ...[]byte) {
	c.mu.Lock()
	defer c.mu.Unlock()
	// send fails only on a connection that has ended.
	_ = c.send(c.client, bytes.Join(messages, nil))
}

// backend returns the process ID of the server's end.
func (c *fieldConn) backend() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pid
}

// inject runs a query on the backend between two statements of the client, without the client's
// knowledge. It returns false while the client is not idle.
func (c *fieldConn) inject(query string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.idle || c.closed {
		return false
	}
	c.swallow++
	return c.send(c.server, queryMessage(query)) == nil
}

// swap gives the client another backend between two of its statements, and ends the
// old one. It returns false while the client is not idle.
func (c *fieldConn) swap() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.idle || c.closed {
		return false
	}
	server, err := net.Dial("tcp", c.server.RemoteAddr().String())
	if err != nil {
		return false
	}
	if err := c.send(server, c.startup); err != nil {
		_ = server.Close()
		return false
	}
	for {
		message, err := readMessage(server, false)
		if err != nil {
			_ = server.Close()
			return false
		}
		switch kindOf(message) {
		case 'K':
			c.pid = int(binary.BigEndian.Uint32(message[5:]))
			continue
		case 'Z':
		default:
			continue
		}
		break
	}
	old := c.server
	c.server = server
	_ = old.Close()
	return true
}

// isListen reports whether a statement begins with LISTEN.
func isListen(message []byte) bool {
	text := bytes.ToUpper(message[5:])
	// The statement's name comes first.
	if kindOf(message) == 'P' {
		_, text, _ = bytes.Cut(text, []byte{0})
	}
	return bytes.HasPrefix(bytes.TrimSpace(text), []byte("LISTEN"))
}

// about reports whether a message has a key among its arguments, in binary or in text.
func about(message []byte, key int64) bool {
	if k := kindOf(message); k != 'B' && k != 'Q' {
		return false
	}
	return bytes.Contains(message, binary.BigEndian.AppendUint64(nil, uint64(key))) ||
		bytes.Contains(message, []byte(strconv.FormatInt(key, 10)))
}

// wireMessage encodes one message.
func wireMessage(kind byte, body []byte) []byte {
	message := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(body)+4))
	return append(message, body...)
}

func queryMessage(query string) []byte { return wireMessage('Q', append([]byte(query), 0)) }

// readyMessage returns the message that the server is ready, outside of a transaction.
func readyMessage() []byte { return wireMessage('Z', []byte{'I'}) }

func errorMessage(severity, code, text string) []byte {
	var body []byte
	for _, f := range []string{"S" + severity, "V" + severity, "C" + code, "M" + text} {
		body = append(append(body, f...), 0)
	}
	return wireMessage('E', append(body, 0))
}

// translated returns an ErrorResponse with its severity in another language.
func translated(message []byte) []byte {
	var body []byte
	for _, f := range bytes.Split(bytes.TrimRight(message[5:], "\x00"), []byte{0}) {
		if f[0] == 'S' {
			f = []byte("S" + map[string]string{"FATAL": "ФАТАЛЬНО", "PANIC": "ПАНИКА"}[string(f[1:])])
			if len(f) == 1 {
				f = []byte("SОШИБКА")
			}
		}
		body = append(append(body, f...), 0)
	}
	return wireMessage('E', append(body, 0))
}
