package locker

import (
	"context"
	"net"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
	"github.com/pkg/errors"
)

const listenerTimeout = 5 * time.Second // for the answer to a ping

// listener is the connection on which a session hears of claims and releases.
// It reconnects by itself. Nothing but speed depends on it.
//
// Two goroutines end with close: one passes notifications on, the other looks
// every heartbeat whether the connection still answers.
type listener struct {
	session *session
	pq      *pq.Listener
	stop    chan struct{}
	done    sync.WaitGroup

	mu     sync.Mutex // guards everything below
	conn   net.Conn   // the newest connection
	closed bool
	err    error         // why it does not listen; nil while it does
	nonce  uuid.UUID     // the notification that expect waits for
	heard  chan struct{} // closed when it arrives
}

func startListener(s *session) *listener {
	l := &listener{session: s, stop: make(chan struct{}), err: errors.New("not connected yet")}
	l.pq = pq.NewDialListener(l, s.dsn, reopenMin, reopenMax, l.changed)
	l.done.Add(3)
	go l.listen()
	go l.dispatch()
	go l.watch()
	return l
}

// close ends the listener and waits for its goroutines.
func (l *listener) close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	close(l.stop)
	_ = l.pq.Close() // it fails only if it is closed already
	l.kill()
	l.done.Wait()
}

// listen ends when the channel is listened to for the first time, or with close.
// Later connections listen by themselves.
func (l *listener) listen() {
	defer l.done.Done()
	for {
		err := l.pq.Listen(notifyChannel)
		if err == nil {
			l.mu.Lock()
			l.err = nil
			l.mu.Unlock()
			return
		}
		select {
		case <-l.stop:
			return
		case <-time.After(reopenMax):
		}
	}
}

func (l *listener) dispatch() {
	defer l.done.Done()
	for n := range l.pq.Notify {
		if n == nil { // reconnected
			l.session.resync()
			continue
		}
		l.session.notified(n.Extra)
	}
}

// watch kills a connection that has gone silent, so that another is made.
func (l *listener) watch() {
	defer l.done.Done()
	tick := time.NewTicker(heartbeatInterval)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		limit := time.AfterFunc(listenerTimeout, l.kill)
		_ = l.pq.Ping() // a connection that fails is replaced
		limit.Stop()
	}
}

// changed is told by lib/pq how the connection fares.
func (l *listener) changed(_ pq.ListenerEventType, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = err
}

// trouble says why the listener does not listen, or nil.
func (l *listener) trouble() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// expect answers a channel that is closed when the notification arrives.
func (l *listener) expect(nonce uuid.UUID) <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nonce, l.heard = nonce, make(chan struct{})
	return l.heard
}

func (l *listener) arrived(nonce uuid.UUID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nonce == nonce && nonce != uuid.Nil {
		l.nonce = uuid.Nil
		close(l.heard)
	}
}

func (l *listener) kill() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.conn != nil {
		_ = l.conn.Close()
	}
}

// Dial and DialTimeout make the listener lib/pq's dialer, so that it can kill its
// connection.
func (l *listener) Dial(network, address string) (net.Conn, error) {
	return l.DialTimeout(network, address, listenerTimeout)
}

func (l *listener) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(l.session.ctx, timeout)
	defer cancel()
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	l.conn = conn
	return conn, nil
}
