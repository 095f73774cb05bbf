// Command webhook is a small service that deploys pull requests. Any number of replicas can run
// side by side.
//
// GitHub delivers every push to one of the replicas. Each delivery claims the lock of its pull
// request before it works. The newest claim wins: a job that runs for an older one is notified, and
// an older one that still waits leaves immediately. With -mode the pushes to some branches let a
// running job finish. Replicas share only a PostgreSQL database. Without -postgres the locks live
// in this process's memory, which is enough to try it out.
//
//	WEBHOOK_SECRET=… go run ./examples/webhook -addr :8080 -name one -mode 'release/*=let_finish'
//
// The service writes events to stdout, one JSON object per line: "received", "outdated",
// "skipped", "started", "notified", "stopped", "finished", "left" and "failed". The last event
// of a delivery, "reports", is the result that its commit should show. Messages of the lock library
// and of the HTTP server go to stderr. With -ops a second address, for operators, serves GET /locks
// and GET /ready.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/preemptable/locker"
)

const (
	// preemptionTimeout is how long a job that was notified keeps its lock at most.
	preemptionTimeout = 10 * time.Second
	// maxDuration is how long a job may run before it is notified.
	maxDuration = 30 * time.Minute
	// patience is how long a delivery waits that lets the running job finish. The default lock
	// timeout is too short for that, because it is meant for a job that was notified.
	patience = maxDuration + preemptionTimeout + 10*time.Second
	// shutdownTimeout bounds the whole shutdown: the time that a job takes to wind down, and the
	// release of its lock.
	shutdownTimeout = preemptionTimeout + 10*time.Second
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second signal ends the process immediately.
	context.AfterFunc(ctx, stop)
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, "webhook:", err)
		os.Exit(1)
	}
}

type config struct {
	addr     string
	ops      string
	postgres string // may contain a password, so it is never printed
	secret   string
	from     string
	name     string
	modes    modes
	work     time.Duration
	windDown time.Duration
}

func parseConfig(args []string, getenv func(string) string, stderr io.Writer) (config, error) {
	var c config
	flags := flag.NewFlagSet("webhook", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.addr, "addr", "127.0.0.1:8080", "address to listen on")
	flags.StringVar(&c.ops, "ops", "", "address for operators to GET /locks and /ready from; keep it private (default: none; needs PostgreSQL)")
	// There is no default from the environment here, because -help prints defaults.
	flags.StringVar(&c.postgres, "postgres", "", "PostgreSQL `URI` (default: $WEBHOOK_POSTGRES_URI; if that is empty too, locks live in memory)")
	flags.StringVar(&c.from, "from", "", "take deliveries of this `kind` of webhook alone, as X-GitHub-Hook-Installation-Target-Type says: repository, organization or integration, an app (default: all)")
	flags.Func("mode", "what a push does to the job that runs: preempt, let_finish or skip_if_busy, as `[BRANCH=]MODE`; BRANCH is a pattern such as release/*; may be repeated, the first that matches counts (default preempt). With skip_if_busy a push that comes while another is at work is not deployed later, and one that comes too late is not rejected", c.modes.add)
	flags.StringVar(&c.name, "name", "webhook", "this replica's name in its events")
	flags.DurationVar(&c.work, "work", 10*time.Second, "how long one simulated deployment takes")
	flags.DurationVar(&c.windDown, "wind-down", time.Second, "how long one takes to stop after it was told to")
	if err := flags.Parse(args); err != nil {
		return config{}, err
	}
	if c.postgres == "" {
		c.postgres = getenv("WEBHOOK_POSTGRES_URI")
	}
	c.secret = getenv("WEBHOOK_SECRET")
	switch {
	case flags.NArg() > 0:
		return config{}, fmt.Errorf("unexpected argument %q", flags.Arg(0))
	case c.secret == "":
		return config{}, errors.New("WEBHOOK_SECRET is not set: everyone could deploy")
	case c.ops != "" && c.postgres == "":
		return config{}, errors.New("-ops needs PostgreSQL: locks in memory are in no list")
	case c.work < 0 || c.windDown < 0:
		return config{}, errors.New("-work and -wind-down must not be negative")
	case c.windDown >= preemptionTimeout:
		return config{}, fmt.Errorf("-wind-down must be shorter than %s: the lock is gone by then", preemptionTimeout)
	}
	return c, nil
}

// closingProvider is a provider that can be closed. Both providers are.
type closingProvider interface {
	locker.LockProvider
	io.Closer
}

// newProvider returns the provider, and the same provider as the one on PostgreSQL, or nil if locks
// live in memory.
func newProvider(c config, log *slog.Logger) (closingProvider, *locker.PostgresLockProvider, error) {
	options := []locker.LockProviderOption{
		locker.WithPreemptionTimeout(preemptionTimeout),
		locker.WithMaxLockDuration(maxDuration),
		locker.WithLogger(log),
	}
	if c.postgres == "" {
		fake, err := locker.NewFakeProvider(options...)
		return fake, nil, err
	}
	postgres, err := locker.NewPostgresProvider(c.postgres, options...)
	return postgres, postgres, err
}

// run serves until ctx is done and everything has ended.
func run(ctx context.Context, args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	c, err := parseConfig(args, getenv, stderr)
	if err != nil {
		return err
	}
	events := slog.New(slog.NewJSONHandler(stdout, nil)).With("replica", c.name)
	log := slog.New(slog.NewTextHandler(stderr, nil)).With("replica", c.name)

	provider, postgres, err := newProvider(c, log)
	if err != nil {
		return err
	}
	worker, err := newWorker(provider, c.modes, c.work, c.windDown, events)
	if err != nil {
		return errors.Join(err, provider.Close())
	}
	listener, err := net.Listen("tcp", c.addr)
	if err != nil {
		return errors.Join(err, provider.Close())
	}
	server := newServer(newHandler([]byte(c.secret), c.from, worker), log)
	served := make(chan error, 2)
	go func() { served <- server.Serve(listener) }()
	about := []any{"addr", listener.Addr().String()}

	// This server serves nothing unless it gets a handler and a listener.
	ops := newServer(nil, log)
	if c.ops != "" {
		opsListener, err := net.Listen("tcp", c.ops)
		if err != nil {
			return errors.Join(err, server.Close(), provider.Close())
		}
		ops.Handler = newOpsHandler(postgres.ListLocks, postgres.Ping, worker)
		go func() { served <- ops.Serve(opsListener) }()
		about = append(about, "ops", opsListener.Addr().String())
	}
	events.Info("listening", about...)

	select {
	// Serve never returns nil, and here it was not asked to end.
	case err = <-served:
	case <-ctx.Done():
		events.Info("shutting down")
	}

	// The order matters. The worker stops accepting deliveries and notifies running jobs. The
	// servers shut down once every request has its response. Then the jobs have to end. The
	// provider is closed last, because the jobs release their locks through it.
	deadline, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	worker.stop()
	return errors.Join(err, server.Shutdown(deadline), ops.Shutdown(deadline), worker.wait(deadline), provider.Close())
}

func newServer(handler http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      15 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn),
	}
}
