package locker

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"database/sql"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/pkg/errors"
)

// A statement is canceled after statementTimeout. The server's own timeouts bound all of a
// statement except its commit, which may wait for a synchronous standby without end. A connection
// that does not respond for answerTimeout is closed.
const (
	statementTimeout = 4 * time.Second
	answerTimeout    = 6 * time.Second
	callTimeout      = 30 * time.Second // for a check of all rows after a reconnect
	openTimeout      = 8 * time.Second  // for all attempts to open a connection: see connectTimeout
)

// refusedError is a reason why a session cannot work on this server. A provider that has never
// worked returns it immediately instead of waiting.
type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

// refused returns a refusedError with the given text.
func refused(format string, args ...any) error {
	return refusedError{errors.Errorf("locker: "+format, args...)}
}

// connectError marks errors that connecting again does not change, such as a login that the server
// refuses. If several hosts have failed, an error that may pass decides.
func connectError(err error) error {
	var hosts interface{ Unwrap() []error }
	if errors.As(err, &hosts) {
		all := hostsError{hosts.Unwrap()[0], strings.NewReplacer(":\n", ": ", "\n", "; ").Replace(err.Error()), false}
		for _, one := range hosts.Unwrap() {
			if !isRefusal(connectError(one)) {
				all.error = one
			}
			all.login = all.login || isLogin(one)
		}
		err = all
	}
	err = errors.Wrap(err, "locker: connect to postgres")
	var certificate *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var file *fs.PathError
	switch {
	// A login, a database, a privilege to connect, a value in the URI.
	case stateIn(err, "28", "3D000", "42501", "22"):
		return refusedError{err}
	// PgBouncer uses this state for outages as well.
	case stateIn(err, "08P01") && strings.Contains(strings.ToLower(pq.As(err).Message), "startup parameter"):
		return refusedError{err}
	// The server does not know a parameter, or a session cannot set it.
	case stateIn(err, "42704", "55P02"):
		return refusedError{errors.WithMessage(err, "locker: a parameter of the postgres URI is no setting of a session")}
	case errors.Is(err, pq.ErrSSLNotSupported):
		return refusedError{errors.WithMessage(err, "locker: TLS is required unless the postgres URI or PGSSLMODE says something else, such as sslmode=disable")}
	case errors.As(err, &certificate), errors.As(err, &authority), errors.As(err, &file):
		return refusedError{err}
	}
	return err
}

// hostsError is the error of one host, with the errors of all hosts in one line of text.
type hostsError struct {
	error
	text  string
	login bool // whether one of them has refused the login
}

func (e hostsError) Error() string { return e.text }

func (e hostsError) Unwrap() error { return e.error }

// broken reports whether an error means that its connection can no longer be used. The SQLSTATE
// decides, because the severity is a word in the server's language. A server that has become
// read-only is left as well.
func broken(err error) bool {
	e := pq.As(err)
	// With the last two the statement was prepared in another backend.
	return e == nil || e.Fatal() || stateIn(err, "08", "57P", "25P03", "25006", "26000", "42P05")
}

// badInput reports whether the server rejects a statement because of the caller's input. It would
// reject a repeat as well.
func badInput(err error) bool { return stateIn(err, "22", "23") }

// isMissingTable reports whether a table or a column does not exist.
func isMissingTable(err error) bool { return stateIn(err, "42P01", "42703") }

// sqlState returns the SQLSTATE of a server's error, or "".
func sqlState(err error) string {
	if e := pq.As(err); e != nil {
		return string(e.Code)
	}
	return ""
}

// stateIn reports whether the SQLSTATE of a server's error begins with one of the prefixes.
func stateIn(err error, prefixes ...string) bool {
	state := sqlState(err)
	return slices.ContainsFunc(prefixes, func(prefix string) bool { return strings.HasPrefix(state, prefix) })
}

// link is a connection for statements. Only its worker uses it, except for kill, which any
// goroutine may call.
type link struct {
	db         *sql.DB
	conn       *sql.Conn
	statements map[string]*sql.Stmt // the prepared statements, by text
	encoding   string               // of the database: see storable
	clock      float64              // the server's clock at clockAt or a little later: see serverTime
	clockAt    time.Time
	tracer     Tracer    // of all statements, or nil
	server     Operation // the server and database, for traces
	unwatch    func() bool

	mu      sync.Mutex // guards everything below
	sockets []net.Conn // the connection, and those that only cancel its statements
	dialed  [2]string  // network and address of the last of them
	killed  bool
}

// openLink connects and applies the settings of a session. The link ends when life is done.
func openLink(life context.Context, dsn dsnFunc, tracer Tracer, timeout time.Duration) (_ *link, err error) {
	ctx, cancel := context.WithTimeout(life, openTimeout)
	defer cancel()
	uri, err := dsn(ctx)
	if err != nil {
		return nil, err
	}
	cfg, err := connectConfig(uri)
	// The environment or the service file has changed.
	if err != nil {
		return nil, refusedError{err}
	}
	connector, err := pq.NewConnectorConfig(cfg)
	if err != nil {
		return nil, refusedError{invalidURI(err)}
	}
	l := &link{statements: map[string]*sql.Stmt{}, tracer: tracer}
	l.unwatch = context.AfterFunc(life, l.kill)
	connector.Dialer(l)
	l.db = sql.OpenDB(connector)
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	defer context.AfterFunc(ctx, l.kill)()
	if l.conn, err = l.db.Conn(ctx); err != nil {
		return nil, connectError(err)
	}
	l.server = l.leadsTo(cfg)
	if _, err = l.conn.ExecContext(context.WithoutCancel(ctx), settings(timeout)); err == nil {
		err = l.conn.QueryRowContext(context.WithoutCancel(ctx), sqlEncoding).Scan(&l.encoding)
	}
	if err != nil {
		return nil, setUpError(err)
	}
	return l, nil
}

// setUpError explains the error of a connection's first statement. A pool accepts a client before
// it has a server session for it.
func setUpError(err error) error {
	if late := noAnswerError(0); errors.As(err, &late) || errors.Is(err, os.ErrDeadlineExceeded) {
		return errors.New("locker: no answer to the first statement of a connection: is a pool in between used up? A provider needs up to four connections")
	}
	// It does not know a setting.
	if stateIn(err, "42704") {
		return refused("PostgreSQL 14 or later is needed: %v", err)
	}
	return errors.Wrap(err, "locker: set up connection")
}

// check returns an error unless the server can carry a session. It does not check NOTIFY. It
// creates the schema if a part is missing.
func (l *link) check(ctx context.Context) error {
	var readOnly, tables, view, allowed bool
	var user string
	if err := l.conn.QueryRowContext(ctx, sqlServer).Scan(&readOnly, &user, &tables, &view); err != nil {
		return errors.Wrap(err, "locker: check server")
	}
	if readOnly {
		return refused("the server is read-only (a standby, or default_transaction_read_only): name the primary, or all hosts with target_session_attrs=read-write")
	}
	if !tables || !view {
		// Only operators need the view.
		if err := l.createSchema(ctx, user); err != nil && !tables {
			return err
		}
	}
	if err := l.conn.QueryRowContext(ctx, sqlPrivileges).Scan(&allowed); err != nil {
		return errors.Wrap(err, "locker: check privileges")
	}
	if !allowed {
		return refused("user %q needs SELECT and INSERT on env_locks, SELECT, INSERT and UPDATE on env_lock_state, and SELECT, INSERT, UPDATE and DELETE on env_lock_sessions", user)
	}
	return nil
}

// createSchema runs SchemaSQL in one transaction. user is for the text of an error.
func (l *link) createSchema(ctx context.Context, user string) error {
	tx, err := l.conn.BeginTx(ctx, nil)
	if err != nil {
		return errors.Wrap(err, "locker: create schema")
	}
	// After Commit this does nothing.
	defer func() { _ = tx.Rollback() }()
	for _, text := range []string{sqlSchemaLimits + sqlSchemaLock, sqlSchemaPath, SchemaSQL} {
		if err == nil {
			_, err = tx.ExecContext(ctx, text)
		}
	}
	if err == nil {
		err = tx.Commit()
	}
	switch {
	case stateIn(err, "42501", "3F000"):
		return refusedError{errors.Wrapf(err, "locker: create schema: user %q may not create or change tables; run the SQL in locker.SchemaSQL (schema.sql) once as a user with that privilege", user)}
	case stateIn(err, "42"):
		return refusedError{errors.Wrap(err, "locker: create schema: there are tables with the same names that are not those of locker.SchemaSQL (schema.sql)")}
	case stateIn(err, "55P03", "57014"):
		return errors.Wrap(err, "locker: create schema: the tables are locked or large: end what locks them, or run the SQL in locker.SchemaSQL (schema.sql) once")
	}
	return errors.Wrap(err, "locker: create schema")
}

// prepared returns the prepared statement for a text. It prepares the statement when it is first
// needed.
func (l *link) prepared(ctx context.Context, text string) (*sql.Stmt, error) {
	if s := l.statements[text]; s != nil {
		return s, nil
	}
	s, err := l.conn.PrepareContext(ctx, text)
	if err != nil {
		return nil, errors.Wrap(err, "locker: prepare statement")
	}
	l.statements[text] = s
	return s, nil
}

// exec runs a statement whose rows do not matter.
func (l *link) exec(ctx context.Context, text string, args ...any) error {
	return l.each(ctx, text, args, nil, nil)
}

// each runs a query. It scans every row into row and then calls f, unless f is nil.
func (l *link) each(ctx context.Context, text string, args, row []any, f func()) (err error) {
	ctx, end := l.trace(ctx, text, f != nil)
	defer func() { finishTrace(end, OperationEnd{Err: err}) }()
	if one := sqlForOne[text]; one != "" {
		if only, ok := elements(args); ok {
			text, args = one, only
		}
	}
	s, err := l.prepared(ctx, text)
	if err != nil {
		return err
	}
	rows, err := s.QueryContext(ctx, args...)
	if err != nil {
		return err
	}
	// The error of Close is that of Err.
	defer func() { _ = rows.Close() }()
	for rows.Next() {
		if f == nil {
			continue
		}
		if err := rows.Scan(row...); err != nil {
			return err
		}
		f()
	}
	return rows.Err()
}

// discard is the destination for a column that only has a side effect.
var discard discardedColumn

type discardedColumn struct{}

func (discardedColumn) Scan(any) error { return nil }

// Dial, DialTimeout and DialContext make the link the dialer of lib/pq.
func (l *link) Dial(network, address string) (net.Conn, error) {
	return l.DialContext(context.Background(), network, address)
}

func (l *link) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return l.DialContext(ctx, network, address)
}

func (l *link) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	dialer := net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 3 * time.Second, Interval: 3 * time.Second, Count: 3}}
	conn, err := dialer.DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.killed {
		_ = conn.Close()
		return nil, net.ErrClosed
	}
	conn = &answeringConn{Conn: conn}
	l.sockets = append(l.sockets, conn)
	l.dialed = [2]string{network, address}
	return conn, nil
}

// kill closes the connection, even while a statement runs. Any goroutine may call it, more than
// once.
func (l *link) kill() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.killed = true
	for _, s := range l.sockets {
		_ = s.Close()
	}
}

// close closes the connection.
func (l *link) close() {
	l.unwatch()
	if l.conn != nil {
		_ = l.conn.Close()
	}
	_ = l.db.Close()
	l.kill()
}

// answeringConn is a connection whose peer must respond to each request in time. Only one goroutine
// at a time uses it, except for Close.
type answeringConn struct {
	net.Conn
	limit time.Time // the driver's deadline, while it connects
}

func (c *answeringConn) SetDeadline(t time.Time) error {
	c.limit = t
	return c.Conn.SetDeadline(t)
}

func (c *answeringConn) Write(b []byte) (int, error) {
	deadline := time.Now().Add(answerTimeout)
	if !c.limit.IsZero() && c.limit.Before(deadline) {
		deadline = c.limit
	}
	if err := c.Conn.SetDeadline(deadline); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// line is one of the two connections that are open as long as the provider is in use: the session's
// and the listener's. It notices immediately when the connection ends. It runs one query at a time.
type line struct {
	conn  *pq.ListenerConn
	calls chan func()   // received by the goroutine that serves the connection
	down  chan struct{} // closed when the connection has ended
}

// openLine connects, applies the settings of a session, and takes the advisory lock unless it is
// zero. heard is called with the payload of each notification, by one goroutine that ends with the
// connection.
func openLine(ctx context.Context, dsn dsnFunc, timeout time.Duration, lock int64, heard func(payload string)) (*line, error) {
	bound, cancel := context.WithTimeout(ctx, openTimeout)
	uri, err := dsn(bound)
	cancel()
	if err != nil {
		return nil, err
	}
	cfg, err := connectConfig(uri)
	if err != nil {
		return nil, refusedError{err}
	}
	notifications := make(chan *pq.Notification, 64)
	// NewListenerConn takes no context and continues when ctx has ended. connectTimeout bounds it.
	conn, err := pq.NewListenerConn(connectionString(cfg), notifications)
	if err != nil {
		return nil, connectError(err)
	}
	l := &line{conn: conn, calls: make(chan func()), down: make(chan struct{})}
	// The goroutine ends when the connection has ended, which closes notifications.
	go func() {
		defer close(l.down)
		for n := range notifications {
			heard(n.Extra)
		}
	}()
	defer context.AfterFunc(ctx, l.end)()
	query := settings(timeout)
	if lock != 0 {
		query += fmt.Sprintf(sqlSessionLock, lock)
	}
	if err := l.exec(openTimeout, query); err != nil {
		l.close()
		return nil, setUpError(err)
	}
	return l, nil
}

// exec runs one statement, and closes the connection if the server does not respond within d.
func (c *line) exec(d time.Duration, query string) error {
	limit := time.AfterFunc(d, c.end)
	executed, err := c.conn.ExecSimpleQuery(query)
	if !limit.Stop() && !executed {
		return noAnswerError(d)
	}
	return err
}

// noAnswerError is the error of a statement to which the server did not respond for that time.
type noAnswerError time.Duration

func (e noAnswerError) Error() string { return fmt.Sprintf("no answer within %v", time.Duration(e)) }

// await waits for the next tick, and meanwhile calls the functions that do passes to it. It reports
// whether there will be no tick, because ctx or the connection has ended. If the connection has
// ended, it returns that error.
func (c *line) await(ctx context.Context, tick *time.Ticker) (closing bool, err error) {
	for {
		select {
		case <-ctx.Done():
			return true, nil
		case <-c.down:
			return true, errors.Wrap(c.conn.Err(), "the connection ended")
		case f := <-c.calls:
			f()
		case <-tick.C:
			return false, nil
		}
	}
}

// do makes the goroutine that serves the connection call f, and returns when f has returned. If the
// connection ends first, f is not called.
func (c *line) do(f func()) {
	called := make(chan struct{})
	select {
	case c.calls <- func() { defer close(called); f() }:
		<-called
	case <-c.down:
	}
}

// end closes the connection. Close fails only if the connection has ended already.
func (c *line) end() { _ = c.conn.Close() }

// close closes the connection, and returns when its goroutines have ended.
func (c *line) close() {
	c.end()
	<-c.down
}

// applicationName returns the name that pg_stat_activity shows, unless the URI sets another one.
func applicationName() string {
	name := "locker"
	if len(os.Args) > 0 {
		name += " " + os.Args[0][strings.LastIndexAny(os.Args[0], `/\`)+1:]
	}
	return name
}

var (
	hostName  = asciiHostName()
	processID = os.Getpid()
)

// asciiHostName returns the machine's name, in characters that every database can store.
func asciiHostName() string {
	// The name is "" if the system has none.
	name, _ := os.Hostname()
	return storable(name, "")
}
