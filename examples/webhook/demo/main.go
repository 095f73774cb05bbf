// Command demo runs the webhook example: it starts the service, sends recorded GitHub deliveries to
// it, prints the events of each pull request as a timeline, and ends with a verdict. With -postgres
// three replicas of the service share one PostgreSQL, and one of them is killed while it works.
//
//	go run ./examples/webhook/demo
//	go run ./examples/webhook/demo -postgres
//
// If any promise was broken, it prints the reason and exits with an error: see judge.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/preemptable/locker/internal/pgserver"
)

func main() {
	postgres := flag.Bool("postgres", false, "three replicas on one PostgreSQL: the one that "+pgserver.EnvURI+" names, or else a throwaway server")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx, *postgres, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, postgres bool, out *os.File) (err error) {
	dir, err := os.MkdirTemp("", "locker-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	fmt.Fprintln(out, "building the service …")
	binary := filepath.Join(dir, "webhook")
	build := exec.CommandContext(ctx, "go", "build", "-o", binary, "github.com/preemptable/locker/examples/webhook")
	if output, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, output)
	}
	deliveries, err := newSender()
	if err != nil {
		return err
	}

	names, play, limit := []string{"one"}, playInMemory, 20*time.Second
	uri := ""
	if postgres {
		names, play, limit = []string{"one", "two", "three"}, playOnPostgres, time.Minute
		fmt.Fprintln(out, "starting PostgreSQL …")
		instance, err := pgserver.Shared(ctx)
		if err != nil {
			return err
		}
		defer instance.Close()
		database, drop, err := instance.NewDatabase(ctx)
		if err != nil {
			return err
		}
		defer drop()
		uri = database
		fmt.Fprintf(out, "of tokens, which are as large as the clock in microseconds, the last %d digits are shown\n\n", tokenDigits)
	}
	return perform(ctx, out, cast{binary: binary, uri: uri, names: names, sender: deliveries}, play, limit)
}

// cast contains what a performance needs.
type cast struct {
	binary string
	uri    string // of the database, or empty if locks live in the service's memory
	names  []string
	sender *sender
}

// perform starts the services, plays the story, ends the services and judges the events.
func perform(ctx context.Context, out *os.File, c cast, play func(context.Context, *stage) error, limit time.Duration) error {
	history := newHistory()
	printed := make(chan struct{})
	ended := make(chan struct{})
	go func() {
		defer close(printed)
		newTimeline(out).follow(history, ended)
	}()

	s := &stage{history: history, sender: c.sender}
	err := func() error {
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		for _, name := range c.names {
			service, err := startService(ctx, c.binary, name, c.sender.secret, c.uri, history)
			if err != nil {
				return err
			}
			s.services = append(s.services, service)
		}
		return play(ctx, s)
	}()
	// A server that shuts down waits for connections that have not been used yet.
	c.sender.client.CloseIdleConnections()
	for _, service := range s.services {
		service.terminate()
	}
	close(ended)
	<-printed

	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	pulls, faults := judge(history.all())
	printSummary(out, pulls)
	if err != nil {
		faults = append(faults, "the story broke off: "+err.Error())
	}
	if len(faults) == 0 {
		printReport(out, history.all())
		fmt.Fprintln(out, "\nEvery promise was kept: one at a time, the newest wins, what is let finish is not notified, late and skipped ones\ndisturb no other, tokens only grow, every process ended well.")
		return nil
	}
	for _, service := range s.services {
		if log := service.stderr.String(); log != "" {
			fmt.Fprintf(out, "\n%s said on stderr:\n%s", service.name, log)
		}
	}
	fmt.Fprintln(out)
	for _, fault := range faults {
		fmt.Fprintln(out, "BROKEN", fault)
	}
	return fmt.Errorf("broken promises: %d", len(faults))
}

func printSummary(out io.Writer, pulls []*pull) {
	fmt.Fprintf(out, "\n%-6s %10s %6s %8s %6s %9s %8s %6s %9s  %-6s %s\n", "PR", "deliveries", "ran", "stopped", "left", "too late", "skipped", "died", "finished", "newest", "overlaps")
	for _, p := range pulls {
		newest := "NO"
		if p.newestFinished {
			newest = "yes"
		}
		fmt.Fprintf(out, "%-6s %10d %6d %8d %6d %9d %8d %6d %9d  %-6s %8d\n",
			fmt.Sprintf("#%d", p.pr), p.deliveries, p.ran, p.stopped, p.left, p.outdated, p.skipped, p.killed, p.finished, newest, p.overlaps)
	}
}

// printReport prints the report of one commit whose job was notified.
func printReport(out io.Writer, events []Event) {
	i := slices.IndexFunc(events, func(e Event) bool { return e.Kind == notified && e.By != "" })
	if i < 0 {
		return
	}
	for _, e := range events {
		if e.Kind == reports && e.Delivery == events[i].Delivery {
			fmt.Fprintf(out, "\nFor #%d %s GitHub is to show: %s,\n%s\n", e.PR, title(e), e.Conclusion, e.Summary)
			return
		}
	}
}
