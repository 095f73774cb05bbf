package main

import (
	"net"
	"sync"
)

// relay is the network between a client and a store. It can become silent: connections stay open
// and nothing arrives until the silence ends. Then everything that was sent is delivered, as by TCP
// after a time of lost packets. It can also refuse: connections are reset, and new ones are
// refused.
type relay struct {
	address string
	target  string
	running sync.WaitGroup

	mu       sync.Mutex   // guards everything below
	turn     *sync.Cond   // the state has changed
	listener net.Listener // nil while it refuses
	silent   bool
	closed   bool
	conns    map[*net.TCPConn]bool // both ends of each connection
	count    int                   // connections to the store
	most     int
}

func newRelay(target string) (*relay, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{address: l.Addr().String(), target: target, listener: l, conns: map[*net.TCPConn]bool{}}
	r.turn = sync.NewCond(&r.mu)
	r.running.Go(func() { r.accept(l) })
	return r, nil
}

func (r *relay) setSilent(silent bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.silent = silent
	r.turn.Broadcast()
}

func (r *relay) refuse() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.listener != nil {
		_ = r.listener.Close()
		r.listener = nil
	}
	r.reset()
}

// admit undoes refuse.
func (r *relay) admit() error {
	l, err := net.Listen("tcp", r.address)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.listener = l
	r.running.Go(func() { r.accept(l) })
	return nil
}

// reset ends all connections with an RST. The caller has to hold the mutex.
func (r *relay) reset() {
	for c := range r.conns {
		_ = c.SetLinger(0)
		_ = c.Close()
	}
	clear(r.conns)
}

// connections returns the largest number of concurrent connections so far.
func (r *relay) connections() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.most
}

func (r *relay) close() {
	r.refuse()
	r.mu.Lock()
	r.closed = true
	r.turn.Broadcast()
	r.mu.Unlock()
	r.running.Wait()
}

func (r *relay) accept(l net.Listener) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		r.running.Go(func() { r.serve(c.(*net.TCPConn)) })
	}
}

// keep records a connection, so that reset finds it. If connections are refused, it closes the
// connection and returns false.
func (r *relay) keep(c *net.TCPConn) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.listener == nil {
		_ = c.SetLinger(0)
		_ = c.Close()
		return false
	}
	r.conns[c] = true
	return true
}

func (r *relay) forget(c *net.TCPConn) {
	_ = c.Close()
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.conns, c)
}

// pass waits until the relay is not silent.
func (r *relay) pass() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.silent && !r.closed {
		r.turn.Wait()
	}
}

func (r *relay) serve(near *net.TCPConn) {
	if !r.keep(near) {
		return
	}
	defer r.forget(near)
	r.pass()
	c, err := net.Dial("tcp", r.target)
	if err != nil {
		_ = near.SetLinger(0)
		return
	}
	far := c.(*net.TCPConn)
	if !r.keep(far) {
		return
	}
	defer r.forget(far)
	r.counted(1)
	defer r.counted(-1)
	var back sync.WaitGroup
	back.Go(func() { r.pump(near, far) })
	r.pump(far, near)
	back.Wait()
}

func (r *relay) counted(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count += n
	r.most = max(r.most, r.count)
}

// pump carries bytes one way. The end of one way ends the connection.
func (r *relay) pump(to, from *net.TCPConn) {
	buffer := make([]byte, 8<<10)
	for {
		n, err := from.Read(buffer)
		r.pass()
		if n > 0 {
			if _, err := to.Write(buffer[:n]); err != nil {
				break
			}
		}
		if err != nil {
			break
		}
	}
	_ = to.Close()
	_ = from.Close()
}
