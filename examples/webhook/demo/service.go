package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	releases = "release/" // the prefix of branches on which a running job may finish

	workTime = 1500 * time.Millisecond // of a job that is not notified
	windDown = 300 * time.Millisecond  // of a job that was notified
	patience = 25 * time.Second        // how long a service may take to end
)

// service is one replica of the webhook service, which runs as a separate process.
type service struct {
	name    string
	url     string
	ops     string // for operators, empty without PostgreSQL
	cmd     *exec.Cmd
	stderr  bytes.Buffer // must be read only after the service has ended
	history *history

	asked  atomic.Bool   // whether it was asked to end
	ended  chan struct{} // closed once the process has ended and the history has all its events
	result error         // set before ended is closed
}

// startService starts a replica on a free port and returns when it listens.
func startService(ctx context.Context, binary, name, secret, uri string, h *history) (*service, error) {
	s := &service{name: name, history: h, ended: make(chan struct{})}
	args := []string{"-addr", "127.0.0.1:0", "-name", name, "-work", workTime.String(), "-wind-down", windDown.String(), "-mode", releases + "*=" + letFinish}
	if uri != "" {
		args = append(args, "-ops", "127.0.0.1:0")
	}
	s.cmd = exec.Command(binary, args...)
	// The secret, and the URI, which may contain a password, are passed in the environment, where
	// other users cannot read them.
	s.cmd.Env = append(os.Environ(), "WEBHOOK_SECRET="+secret, "WEBHOOK_POSTGRES_URI="+uri)
	s.cmd.Stderr = &s.stderr
	stdout, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	go s.follow(stdout)

	up, err := h.wait(ctx, name+" to listen", func(e Event) bool { return e.Kind == listening && e.Replica == name })
	if err != nil {
		s.terminate()
		return nil, fmt.Errorf("%w\n%s", err, s.stderr.Bytes())
	}
	s.url, s.ops = "http://"+up.Addr, "http://"+up.Ops
	return s, nil
}

// follow records the service's events until it has ended.
func (s *service) follow(stdout io.Reader) {
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		var e Event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil || e.Time.IsZero() || e.Kind == "" {
			e = Event{Kind: failed, Replica: s.name, Reason: fmt.Sprintf("says what is no event: %.200q", lines.Text())}
		}
		s.history.add(e)
	}
	// A line that was too long must not block the service.
	_, _ = io.Copy(io.Discard, stdout)
	s.result = s.cmd.Wait()
	if !s.asked.Load() {
		s.history.add(Event{Kind: exited, Replica: s.name, Reason: fmt.Sprintf("ended unasked (%v)", s.cmd.ProcessState)})
	}
	close(s.ended)
}

// terminate asks the service to end and waits until it has.
func (s *service) terminate() {
	if s.asked.Swap(true) {
		<-s.ended
		return
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); errors.Is(err, os.ErrProcessDone) {
		<-s.ended
		return
	}
	e := Event{Kind: exited, Replica: s.name}
	select {
	case <-s.ended:
		if s.result != nil {
			e.Reason = s.result.Error()
		}
	case <-time.After(patience):
		_ = s.cmd.Process.Kill()
		<-s.ended
		e.Reason = fmt.Sprintf("did not end within %s of SIGTERM", patience)
	}
	s.history.add(e)
}

// kill ends the service like a crash: it cannot release anything.
func (s *service) kill() error {
	s.asked.Store(true)
	if err := s.cmd.Process.Kill(); err != nil {
		return err
	}
	<-s.ended
	s.history.add(Event{Kind: killed, Replica: s.name})
	return nil
}
