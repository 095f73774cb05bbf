package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// envChild is set in the processes that the benchmark starts from its own executable. It contains a
// childSpec.
const envChild = "LOCKER_PEERS_CHILD"

// childSpec determines the locks that a child process takes. It holds them until it is killed or
// its standard input ends.
type childSpec struct {
	Peer    string
	URI     string
	Options options
	First   int
	Count   int
}

// childReport is the report of a child process once it holds its locks.
type childReport struct {
	Error      string `json:",omitempty"`
	Token      int64  // of the first one
	Bytes      int64  // of the heap and the stacks, in addition to those before the client was opened
	Goroutines int    // likewise, their number
}

// The questions to a child, one per line. It replies with a list of one truth value for each lock.
const (
	askAlive   = "alive"   // whether its holder may continue
	askRelease = "release" // whether it was held until it was released now
)

// runChild is the main function of a child process. It returns the exit code.
func runChild(text string) int {
	report, holds := takeAll(text)
	out := json.NewEncoder(os.Stdout)
	if err := out.Encode(report); err != nil || report.Error != "" {
		return 1
	}
	asked := bufio.NewScanner(os.Stdin)
	for asked.Scan() {
		answers := make([]bool, len(holds))
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
		_ = each(len(holds), 16, func(i int) error {
			switch asked.Text() {
			case askAlive:
				answers[i] = holds[i].alive(ctx)
			case askRelease:
				answers[i] = holds[i].release(ctx) == nil
			}
			return nil
		})
		cancel()
		if err := out.Encode(answers); err != nil {
			return 1
		}
	}
	runtime.KeepAlive(holds)
	// The remaining locks are still held. The end of the input means that they are not of interest.
	return 0
}

func takeAll(text string) (r childReport, holds []hold) {
	var spec childSpec
	if err := json.Unmarshal([]byte(text), &spec); err != nil {
		return childReport{Error: err.Error()}, nil
	}
	p := peerByID(spec.Peer)
	if p == nil {
		return childReport{Error: "unknown peer " + spec.Peer}, nil
	}
	ctx := context.Background()
	memory, goroutines := heap(), runtime.NumGoroutine()
	c, err := p.open(ctx, spec.URI, spec.Options)
	if err == nil {
		holds, err = lockAll(ctx, c, spec.First, spec.Count)
	}
	if err != nil {
		return childReport{Error: err.Error()}, nil
	}
	return childReport{
		Token: holds[0].token(), Bytes: heap() - memory, Goroutines: runtime.NumGoroutine() - goroutines,
	}, holds
}

// lockAll takes the locks of many keys, some concurrently.
func lockAll(ctx context.Context, c client, first, count int) ([]hold, error) {
	holds := make([]hold, count)
	return holds, each(count, 32, func(i int) (err error) {
		holds[i], err = c.lock(ctx, first+i)
		return err
	})
}

// each runs f(0) … f(n-1), a number of them concurrently, and returns the first error.
func each(n, concurrently int, f func(i int) error) error {
	var next atomic.Int64
	var running sync.WaitGroup
	errs := make(chan error, n)
	for range min(n, concurrently) {
		running.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				if err := f(i); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	running.Wait()
	close(errs)
	return <-errs
}

// heap returns the memory in use after a collection, including the stacks of goroutines.
func heap() int64 {
	var m runtime.MemStats
	for range 3 {
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc + m.StackInuse)
}

// child is a child process that holds locks.
type child struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    *bufio.Reader
	report childReport
}

// startChild returns when the child holds all of its locks. The child ends with this process,
// because its standard input ends then.
func startChild(ctx context.Context, spec childSpec) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), envChild+"="+string(text))
	cmd.Stderr = os.Stderr
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{cmd: cmd, in: in, out: bufio.NewReader(out)}
	err = c.read(&c.report)
	if err == nil && c.report.Error != "" {
		err = errors.New(c.report.Error)
	}
	if err != nil {
		c.kill()
		return nil, fmt.Errorf("child process of %s: %w", spec.Peer, err)
	}
	return c, nil
}

func (c *child) read(to any) error {
	line, err := c.out.ReadBytes('\n')
	if err != nil {
		return err
	}
	return json.Unmarshal(line, to)
}

// ask returns one reply for each of the child's locks.
func (c *child) ask(question string) (answers []bool, err error) {
	if _, err := fmt.Fprintln(c.in, question); err != nil {
		return nil, err
	}
	err = c.read(&answers)
	return answers, err
}

// kill ends the child by SIGKILL, and returns when its process has ended.
func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
	_ = c.in.Close()
}
