package fault

import (
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// echo answers what it is sent.
func echo(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() { // ends with the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { // ends with the connection
				_, _ = io.Copy(c, c)
				_ = c.Close()
			}()
		}
	}()
	return l.Addr().String()
}

func TestProxy(t *testing.T) {
	p, err := NewProxy(echo(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", p.Address())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	send := func(c net.Conn, text string) {
		t.Helper()
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	// hear answers what comes within a time, and how long that took.
	hear := func(c net.Conn, limit time.Duration) (string, time.Duration, error) {
		start := time.Now()
		_ = c.SetReadDeadline(start.Add(limit))
		buf := make([]byte, 100)
		n, err := c.Read(buf)
		return string(buf[:n]), time.Since(start), err
	}
	session, listener := dial(), dial()
	send(session, "\x00startup")
	if text, _, err := hear(session, 5*time.Second); text != "\x00startup" {
		t.Fatal(text, err)
	}
	send(listener, "\x00startup")
	if text, _, err := hear(listener, 5*time.Second); text != "\x00startup" {
		t.Fatal(text, err)
	}
	send(listener, `Q    LISTEN "x"`)
	if text, _, err := hear(listener, 5*time.Second); text == "" {
		t.Fatal(err)
	}

	p.Change(func(s *Shape) { s.Silent[ToClient] = true }, Session)
	send(session, "Q1")
	send(listener, "Q2")
	if text, _, err := hear(session, 200*time.Millisecond); !os.IsTimeout(err) {
		t.Fatalf("%q %v through a silent network", text, err)
	}
	if text, _, err := hear(listener, 5*time.Second); text != "Q2" {
		t.Fatalf("%q %v: only the session is silent", text, err)
	}
	p.Change(func(s *Shape) { *s = Shape{} }, Session)
	if text, _, err := hear(session, 5*time.Second); text != "Q1" {
		t.Fatalf("%q %v after the silence", text, err)
	}

	p.Change(func(s *Shape) { s.Latency = 100 * time.Millisecond }, Session)
	send(session, "Q3")
	if text, took, err := hear(session, 5*time.Second); text != "Q3" || took < 200*time.Millisecond {
		t.Fatalf("%q %v after %v", text, err, took)
	}
	p.Change(func(s *Shape) { *s = Shape{Rate: 100} }, Session)
	send(session, "0123456789012345678901234567890123456789")
	var all string
	start := time.Now()
	for len(all) < 40 {
		text, _, err := hear(session, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		all += text
	}
	if took := time.Since(start); took < 300*time.Millisecond {
		t.Fatalf("40 bytes in %v", took)
	}

	p.Refuse()
	if _, _, err := hear(listener, 5*time.Second); err == nil || os.IsTimeout(err) {
		t.Fatal("the connection is still open:", err)
	}
	if c, err := net.Dial("tcp", p.Address()); err == nil {
		_ = c.Close()
		t.Fatal("not refused")
	}
	if err := p.Accept(); err != nil {
		t.Fatal(err)
	}
	again := dial()
	send(again, "\x00startup")
	if text, _, err := hear(again, 5*time.Second); text != "\x00startup" {
		t.Fatal(text, err)
	}
}

func TestBackend(t *testing.T) {
	c := &conn{proxy: &Proxy{}}
	login := []byte("R\x00\x00\x00\x08\x00\x00\x00\x00K\x00\x00\x00\x0c\x00\x00\x30\x39\x00\x00\x00\x01Z\x00\x00\x00\x05I")
	for i := range login {
		if c.learnBackend(login[:i]) {
			t.Fatal("the login is not over after", i)
		}
	}
	if !c.learnBackend(login) || c.pid != 12345 {
		t.Fatal(c.pid)
	}
}
