package pgserver

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/lib/pq"
)

// The environment variables that the tests read, in addition to EnvBin.
const (
	// EnvURI is the URI of a running server to use, as a user with the privilege to create
	// databases.
	EnvURI = "LOCKER_TEST_POSTGRES_URI"
	// EnvRestart is a shell command that restarts the server at EnvURI. It gets "fast" or
	// "immediate" as its argument.
	EnvRestart = "LOCKER_TEST_POSTGRES_RESTART"
)

// ErrCannotRestart means that the server is a foreign one and EnvRestart does not contain a command
// to restart it.
var ErrCannotRestart = errors.New("pgserver: cannot restart the server at " + EnvURI + "; set " + EnvRestart)

// Instance is the server that a test run uses: a running one if the environment names it, otherwise
// a throwaway cluster.
type Instance struct {
	uri     string  // of the foreign server, or empty
	restart string  // the foreign server's restart command
	server  *Server // the throwaway cluster, or nil for a foreign server
}

// Shared finds or starts the server to run tests against. Close ends the server that Shared has
// started. A process that ends without Close leaves nothing behind either, so a test binary may
// keep one Instance for its whole life.
func Shared(ctx context.Context) (*Instance, error) {
	uri := os.Getenv(EnvURI)
	if uri == "" {
		server, err := Start(ctx, Options{Config: map[string]string{"max_connections": "200"}})
		if err != nil {
			return nil, err
		}
		return &Instance{server: server}, nil
	}
	if _, err := parseURI(uri); err != nil {
		return nil, err
	}
	instance := &Instance{uri: uri, restart: os.Getenv(EnvRestart)}
	if err := instance.await(ctx); err != nil {
		return nil, fmt.Errorf("pgserver: the server at %s does not answer: %w", EnvURI, err)
	}
	return instance, nil
}

// parseURI never repeats the URI in its error, because it may contain a password.
func parseURI(uri string) (*url.URL, error) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != "postgres" && u.Scheme != "postgresql" {
		return nil, errors.New("pgserver: " + EnvURI + " must look like postgres://user:password@host:port/database")
	}
	return u, nil
}

// Own reports whether the server is a throwaway cluster, which a test may change in any way.
func (i *Instance) Own() bool { return i.server != nil }

// Server returns the throwaway cluster, or nil for a foreign server.
func (i *Instance) Server() *Server { return i.server }

// NewDatabase creates an empty database for one test. drop removes it, and ends all connections to
// it.
func (i *Instance) NewDatabase(ctx context.Context) (uri string, drop func(), err error) {
	name := uniqueName("locker_test")
	admin := i.admin()
	if err := createDatabase(ctx, admin, name); err != nil {
		return "", nil, fmt.Errorf("pgserver: create a database: %w", err)
	}
	u, err := parseURI(admin)
	if err != nil {
		return "", nil, err
	}
	u.Path = "/" + name
	drop = func() {
		// This is a separate context, because the test's is done by now. The bound is for a server
		// that a test has left in a bad state.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
		defer cancel()
		err := withDB(admin, func(db *sql.DB) error {
			_, err := db.ExecContext(ctx, "DROP DATABASE IF EXISTS "+pq.QuoteIdentifier(name)+" WITH (FORCE)")
			return err
		})
		if err != nil && !i.Own() {
			fmt.Fprintf(os.Stderr, "pgserver: database %s is left behind: %v\n", name, err)
		}
	}
	return u.String(), drop, nil
}

func (i *Instance) admin() string {
	if i.server != nil {
		return i.server.URI("postgres")
	}
	return i.uri
}

// Restart restarts the server and returns when it accepts connections again. The error matches
// ErrCannotRestart if there is no command to restart a foreign server.
func (i *Instance) Restart(ctx context.Context, mode string) error {
	if i.server != nil {
		return i.server.Restart(ctx, mode)
	}
	if i.restart == "" {
		return ErrCannotRestart
	}
	if mode != Fast && mode != Immediate {
		return fmt.Errorf("pgserver: unknown way to restart %q (fast or immediate)", mode)
	}
	out, err := exec.CommandContext(ctx, "sh", "-c", i.restart+` "$1"`, "restart", mode).CombinedOutput()
	if err != nil {
		return fmt.Errorf("pgserver: %s: %w\n%s", EnvRestart, err, tail(string(out)))
	}
	return i.await(ctx)
}

// await waits until a foreign server accepts connections.
func (i *Instance) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		err := withDB(i.uri, func(db *sql.DB) error {
			ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
			defer cancel()
			return db.PingContext(ctx)
		})
		if err == nil || !transient(err) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// transient reports whether an error is that of a server that starts or stops, and not of one that
// has rejected the login.
func transient(err error) bool {
	var answer *pq.Error
	if !errors.As(err, &answer) {
		return true
	}
	return strings.HasPrefix(string(answer.Code), "57P") // shutting down, crashed, or starting up
}

// Close ends the throwaway cluster. It does not affect a foreign server.
func (i *Instance) Close() error {
	if i.server == nil {
		return nil
	}
	return i.server.Close()
}
