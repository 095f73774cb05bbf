package locker

import (
	"context"
	"database/sql"
	_ "embed"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/lib/pq"
	"github.com/pkg/errors"
	sqltrace "gopkg.in/DataDog/dd-trace-go.v1/contrib/database/sql"
	"gopkg.in/DataDog/dd-trace-go.v1/ddtrace/ext"
)

// SchemaSQL creates what the postgres provider needs in its database: the tables
// env_locks and env_lock_state, and the view env_lock_overview. The provider runs
// it on first use; without the privilege to, it names SchemaSQL in its error, and
// somebody who has the privilege runs it once (C28). Running it again is harmless.
//
//go:embed schema.sql
var SchemaSQL string

// The statements. They take arrays, so that one of them serves any number of
// locks; those that write have them sorted by key, so that two connections never lock
// rows in opposite order.
const (
	sqlLookup = `
SELECT w.ord, e.lock_key
FROM unnest($1::text[], $2::integer[]) WITH ORDINALITY AS w(repo, pull_request, ord)
JOIN env_locks e ON e.repo = w.repo AND e.pull_request = w.pull_request`

	sqlClock = `(date_part('epoch', clock_timestamp()) * 1000000)::bigint` // microseconds

	// The commit is not flushed. Once a statement is enough, but only a release has
	// so many rows that it matters.
	sqlNoFlush = `set_config('synchronous_commit', 'off', true)`

	// With the row that the first claim will look for.
	sqlAddKeys = `
WITH added AS (
    INSERT INTO env_locks (repo, pull_request, lock_key)
    SELECT * FROM unnest($1::text[], $2::integer[], $3::bigint[])
    ON CONFLICT DO NOTHING
    RETURNING lock_key
)
INSERT INTO env_lock_state (lock_key) SELECT lock_key FROM added
ON CONFLICT DO NOTHING`

	sqlProve = `SELECT pg_notify('` + notifyChannel + `', $1)`

	// Makes durable whatever was committed before; it locks nothing.
	sqlFlush = `SELECT pg_logical_emit_message(true, 'locker', '')`

	// Why a claim was not announced.
	sqlWhyNot = `
SELECT u.key, u.pull_request >= 0 AND NOT coalesce((
        SELECT e.repo = u.repo AND e.pull_request = u.pull_request FROM env_locks e WHERE e.lock_key = u.key), false),
    s.lock_key IS NULL, s.claim_event, s.top_order
FROM unnest($1::bigint[], $2::text[], $3::integer[]) AS u(key, repo, pull_request)
LEFT JOIN env_lock_state s ON s.lock_key = u.key`

	// A claim that gave up no longer stands in the way of its own redelivery.
	sqlWithdraw = `
UPDATE env_lock_state s SET claim_open = false
FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
WHERE s.lock_key = w.key AND s.claim_id = w.id AND s.claim_open
RETURNING s.lock_key, ` + sqlNoFlush

	// The claim is checked before the advisory lock is tried, and again on the
	// row itself. The commit is flushed: it makes the token durable, and with it
	// every claim before. SET sees whether the old holder was still there under
	// the row lock.
	sqlAcquire = `
WITH tried AS MATERIALIZED (
    SELECT seen.*, CASE WHEN NOT missing AND valid AND tryable THEN pg_try_advisory_lock(key) ELSE false END AS got
    FROM (
        SELECT w.*, s.lock_key IS NULL AS missing,
            s.holder_id IS NULL OR s.claim_id = w.id AND (s.claim_session <> $10::integer OR NOT s.claim_open) AS hidden,
            s.claim AS newest, s.claim_id AS newest_id, s.claim_event AS newest_event,
            w.first OR s.claim < w.claim OR s.claim_id = w.id OR s.claim = w.claim AND s.claim_id = w.claim_id AS valid
        FROM unnest($1::bigint[], $2::uuid[], $3::bigint[], $4::uuid[], $5::boolean[], $6::boolean[], $7::text[])
            AS w(key, id, claim, claim_id, first, tryable, event)
        LEFT JOIN env_lock_state s ON s.lock_key = w.key
    ) seen
), taken AS (
    UPDATE env_lock_state s SET
        claim = CASE WHEN t.first THEN s.claim ELSE greatest(s.claim, t.claim) END,
        claim_id = CASE WHEN t.first THEN s.claim_id ELSE t.claim_id END,
        waiting = false,
        claim_open = s.claim_open OR s.claim_id = t.id,
        claim_session = CASE WHEN s.claim_id = t.id THEN $10::integer ELSE s.claim_session END,
        token = greatest(s.token + 1, ` + sqlClock + `),
        unclean_at = CASE WHEN s.holder_id IS NULL THEN s.unclean_at ELSE clock_timestamp() END,
        holder_id = t.id, holder_event = t.event, holder_host = $8, holder_pid = $9, held_since = clock_timestamp()
    FROM tried t
    WHERE t.got AND s.lock_key = t.key AND (t.first OR s.claim < t.claim OR s.claim_id = t.id OR s.claim = t.claim AND s.claim_id = t.claim_id)
    RETURNING s.lock_key, s.claim, s.claim_id, s.token,
        date_part('epoch', clock_timestamp() - s.unclean_at) AS age
)
SELECT key, missing, hidden, valid, got, newest, newest_id,
    CASE WHEN NOT valid THEN newest_event END, NULL::bigint, NULL::float8 FROM tried
UNION ALL
SELECT lock_key, false, false, true, true, claim, claim_id, NULL, token, age FROM taken`

	// A row is missing at acquire when the claim was never announced or the
	// operator deleted it.
	sqlEnsure = `
INSERT INTO env_lock_state (lock_key) SELECT unnest($1::bigint[]) ON CONFLICT DO NOTHING`

	// Asks for a "released" where the row itself does not tell that somebody
	// waits, and answers whether the row did not know. A holder that the row does
	// not know is one of the original library: it listens on a channel that is
	// named by the key, but only some time after it has the key, so it is told
	// again with every try. A claim that waits on in a new session says so, too.
	sqlWait = `
WITH asked AS (
    UPDATE env_lock_state s SET waiting = true,
        claim_open = s.claim_open OR s.claim_id = w.id,
        claim_session = CASE WHEN s.claim_id = w.id THEN $3::integer ELSE s.claim_session END
    FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
    WHERE s.lock_key = w.key AND (NOT s.waiting OR s.claim_id = w.id AND (s.claim_session <> $3::integer OR NOT s.claim_open))
    RETURNING s.lock_key
)
SELECT s.lock_key, a.lock_key IS NOT NULL, ` + sqlNoFlush + `,
    CASE WHEN s.holder_id IS NULL AND s.claim_open THEN pg_notify(s.lock_key::text,
        format('{"id":"%s","event":%s,"lockKey":%s}', s.claim_id, to_json(s.claim_event), s.lock_key))::text END
FROM env_lock_state s LEFT JOIN asked a ON a.lock_key = s.lock_key WHERE s.lock_key = ANY ($1::bigint[])`

	// The advisory lock is freed inside the transaction that clears the holder:
	// a successor that gets it at once still waits for the row, and so never
	// mistakes a clean end for a death. A missing row answers nothing; its
	// advisory lock is then given back by sqlGiveBack. (Without the first key's row
	// the commit is flushed.)
	sqlRelease = `
UPDATE env_lock_state s
SET holder_id = NULL, holder_event = NULL, holder_host = NULL, holder_pid = NULL, held_since = NULL,
    claim_open = s.claim_open AND s.claim_id <> w.id
FROM unnest($1::bigint[], $2::uuid[], $3::boolean[]) AS w(key, id, shared)
WHERE s.lock_key = w.key AND s.holder_id = w.id
RETURNING s.lock_key,
    CASE WHEN w.shared THEN pg_advisory_unlock_shared(s.lock_key) OR pg_advisory_unlock(s.lock_key) ELSE pg_advisory_unlock(s.lock_key) END,
    CASE WHEN s.lock_key = ($1::bigint[])[1] THEN ` + sqlNoFlush + ` END,
    CASE WHEN s.waiting OR s.claim_id <> w.id THEN pg_notify('` + notifyChannel + `', format('` + payloadReleased + `', s.lock_key))::text END`

	// Frees what this connection holds of the keys, and nothing else.
	sqlGiveBack = `
SELECT h.key, CASE h.mode WHEN 'ShareLock' THEN pg_advisory_unlock_shared(h.key) ELSE pg_advisory_unlock(h.key) END,
    ` + sqlNoFlush + `, pg_notify('` + notifyChannel + `', format('` + payloadReleased + `', h.key))::text
FROM (SELECT (l.classid::bigint << 32) | l.objid::bigint AS key, l.mode FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.pid = pg_backend_pid() AND l.objsubid = 1) h
WHERE h.key = ANY ($1::bigint[])`

	// The three steps by which a hold moves to another connection, see park. Where a
	// release failed halfway the first finds nothing to exchange, and puts back what it
	// took: IS NULL is false, but not known to the planner.
	sqlShare = `
SELECT k.key, CASE WHEN NOT pg_try_advisory_lock_shared(k.key) THEN false
    WHEN pg_advisory_unlock(k.key) THEN true
    ELSE pg_advisory_unlock_shared(k.key) IS NULL END
FROM unnest($1::bigint[]) AS k(key)`
	sqlTakeOver = `SELECT k.key, pg_try_advisory_lock_shared(k.key) FROM unnest($1::bigint[]) AS k(key)`
	sqlLetGo    = `SELECT k.key, pg_advisory_unlock_shared(k.key) FROM unnest($1::bigint[]) AS k(key)`

	// The keys whose newest claim is not their holder's: what repairs a lost
	// NOTIFY (C8). The first row always answers.
	sqlHeartbeat = `
SELECT pg_backend_pid(), NULL::bigint, NULL::bigint, NULL::uuid, NULL::text
UNION ALL
SELECT 0, s.lock_key, s.claim, s.claim_id, s.claim_event
FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
JOIN env_lock_state s ON s.lock_key = w.key WHERE s.claim_id <> w.id`

	// How every session is set up. The two timeouts lie below the heartbeat's
	// bound, so that a row that somebody else keeps locked cannot cost the
	// session its life. The plans are by index whatever the statistics say.
	sqlSettings = `
SET lock_timeout = '1s'; SET statement_timeout = '3s';
SET idle_session_timeout = '15s'; SET idle_in_transaction_session_timeout = '15s';
SET tcp_keepalives_idle = 3; SET tcp_keepalives_interval = 3; SET tcp_keepalives_count = 3;
SET default_transaction_isolation = 'read committed';
SET jit = off; SET plan_cache_mode = force_generic_plan;
SET enable_seqscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off`

	sqlServer = `
SELECT pg_backend_pid(), pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on',
    current_setting('server_version_num')::integer, current_setting('synchronous_commit'), current_user,
    to_regclass('env_locks') IS NOT NULL AND to_regclass('env_lock_state') IS NOT NULL`

	// Whether the connection with that number and process is at this server.
	sqlSameServer = `
SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid::bigint = ` + sessionSpace + `
    AND objid::bigint = $1 AND pid = $2 AND database = (SELECT oid FROM pg_database WHERE datname = current_database()))`

	sqlPrivileges = `
SELECT has_table_privilege('env_locks', 'SELECT') AND has_table_privilege('env_locks', 'INSERT')
    AND has_table_privilege('env_lock_state', 'SELECT') AND has_table_privilege('env_lock_state', 'INSERT')
    AND has_table_privilege('env_lock_state', 'UPDATE')`
)

// announceSQL is the statement by which claims become the newest of their keys.
//
// A claim's number is made under the row lock, so the row decides the order. The
// clock in it keeps numbers growing where the row cannot: after a crash that forgot
// claims, or after the row was deleted. In a batch where some have an order, a claim
// with one is turned away, by answering no row, if a higher order has been announced,
// or the same by somebody who still waits or holds. It is a statement of its own
// because the server takes a tenth of a cycle to set up that condition.
//
// A claim that is to take the key at once tries if nobody holds or waits, as
// sqlAcquire would next. Who has the advisory lock always takes the row: a
// holder that it still names is dead.
//
// A commit that only takes is flushed. One that notifies is not: notifying
// transactions commit one after the other, server-wide. The fifth column is set if the
// commit is not flushed; if it took a key all the same, sqlFlush follows.
//
// A claim for a pull request that has another key is dropped, too. Which
// of the reasons it was, and a row that is missing, sqlWhyNot tells.
func announceSQL(ordered bool) string {
	name, array, column, set, condition := "", "", "", "claim_order = NULL", ""
	if ordered {
		name, array, column = ", ord", ", $10::bigint[]", " u.ord,"
		set = "claim_order = w.ord, top_order = coalesce(w.ord, s.top_order)"
		condition = ` AND (w.ord IS NULL OR s.top_order IS NULL OR w.ord > s.top_order
    OR w.ord = s.top_order AND (s.claim_id = w.id OR NOT s.claim_open
        OR s.claim_order IS DISTINCT FROM w.ord
        OR NOT EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'advisory' AND l.objsubid = 2
            AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
            AND l.classid::bigint = ` + sessionSpace + ` AND l.objid::bigint = s.claim_session)))`
	}
	return `
WITH want AS MATERIALIZED (
    SELECT u.key, u.id, u.event,` + column + `
        CASE WHEN u.wait IS NULL AND s.holder_id IS NULL AND NOT s.waiting THEN pg_try_advisory_lock(u.key) ELSE false END AS got
    FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::integer[], $6::boolean[]` + array + `)
        AS u(key, id, event, repo, pull_request, wait` + name + `)
    JOIN env_lock_state s ON s.lock_key = u.key
    LEFT JOIN env_locks e ON e.lock_key = u.key
    WHERE u.pull_request < 0 OR e.repo = u.repo AND e.pull_request = u.pull_request
)
UPDATE env_lock_state s SET
    claim = greatest(s.claim + 1, ` + sqlClock + `),
    claim_id = w.id,
    claim_event = w.event,
    claimed_at = statement_timestamp(),
    ` + set + `,
    claim_open = true,
    claim_session = $7::integer,
    claim_host = $8::text,
    claim_pid = $9::integer,
    token = CASE WHEN w.got THEN greatest(s.token + 1, ` + sqlClock + `) ELSE s.token END,
    unclean_at = CASE WHEN w.got AND s.holder_id IS NOT NULL THEN clock_timestamp() ELSE s.unclean_at END,
    holder_id = CASE WHEN w.got THEN w.id ELSE s.holder_id END,
    holder_event = CASE WHEN w.got THEN w.event ELSE s.holder_event END,
    holder_host = CASE WHEN w.got THEN $8::text ELSE s.holder_host END,
    holder_pid = CASE WHEN w.got THEN $9::integer ELSE s.holder_pid END,
    held_since = CASE WHEN w.got THEN statement_timestamp() ELSE s.held_since END
FROM want w
WHERE s.lock_key = w.key` + condition + `
RETURNING s.lock_key, s.claim, CASE WHEN w.got THEN s.token END,
    CASE WHEN w.got THEN date_part('epoch', clock_timestamp() - s.unclean_at) END,
    CASE WHEN s.waiting OR NOT w.got THEN ` + sqlNoFlush + ` END,
    CASE WHEN s.waiting OR s.holder_id IS NOT NULL AND NOT w.got THEN pg_notify('` + notifyChannel + `',
        format('` + payloadClaim + `', s.lock_key, s.claim, s.claim_id, to_json(s.claim_event)))::text END`
}

// The two-key space of advisory locks, in which no lock of a user lives: under
// schemaLock concurrent starts make the schema; in sessionSpace every session
// locks its own number, by which others see whether it lives.
const (
	schemaLock   = `SELECT pg_advisory_xact_lock(1819239269, 1919116148)`
	sessionSpace = `1819239270`
	sessionLock  = `SELECT pg_advisory_lock(` + sessionSpace + `, $1)`
)

const openTimeout = 8 * time.Second // longest that opening a session may take

// link is one connection of a session: it holds advisory locks, and they end with
// it. It is used by its lane's worker alone, except kill.
type link struct {
	generation uint64
	pid        int
	commit     string // synchronous_commit, as it was set
	number     int32  // by which others see whether the session lives
	db         *sql.DB
	conn       *sql.Conn
	socket     *watchedConn // set by DialContext
	stall      stallWatch

	prove, lookup, addKeys, announce, announceOrdered, flush, whyNot, withdraw, acquire, ensure, wait, release, giveBack, share, takeOver, letGo, heartbeat *sql.Stmt

	mu     sync.Mutex // guards socket and killed against kill
	killed bool
}

// refusedError is a reason why a session cannot work on this server at all: it
// makes no sense to wait.
type refusedError struct{ error }

func (e refusedError) Unwrap() error { return e.error }

func refused(format string, args ...any) error {
	return refusedError{errors.Errorf("locker: "+format, args...)}
}

// openLink connects, checks the server and prepares the statements.
func openLink(ctx context.Context, dsn, serviceName string, generation uint64) (_ *link, err error) {
	l := &link{generation: generation}
	connector, err := pq.NewConnector(dsn)
	if err != nil {
		return nil, refused("postgres URI is invalid")
	}
	connector.Dialer(l)
	if serviceName == "" {
		l.db = sql.OpenDB(connector)
	} else {
		l.db = sqltrace.OpenDB(connector, sqltrace.WithServiceName(serviceName), sqltrace.WithChildSpansOnly(),
			sqltrace.WithCustomTag(ext.DBSystem, ext.DBSystemPostgreSQL))
	}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	stop := context.AfterFunc(ctx, l.kill)
	defer stop()
	if l.conn, err = l.db.Conn(ctx); err != nil {
		return nil, connectError(err)
	}
	ctx = context.WithoutCancel(ctx) // kill ends the statements; lib/pq would open another connection to cancel them
	if err := l.check(ctx); err != nil {
		return nil, poolerError(err)
	}
	for _, s := range []struct {
		stmt **sql.Stmt
		text string
	}{
		{&l.prove, sqlProve}, {&l.lookup, sqlLookup}, {&l.addKeys, sqlAddKeys}, {&l.announce, announceSQL(false)},
		{&l.announceOrdered, announceSQL(true)}, {&l.flush, sqlFlush}, {&l.whyNot, sqlWhyNot}, {&l.withdraw, sqlWithdraw},
		{&l.acquire, sqlAcquire}, {&l.ensure, sqlEnsure}, {&l.wait, sqlWait},
		{&l.release, sqlRelease}, {&l.giveBack, sqlGiveBack},
		{&l.share, sqlShare}, {&l.takeOver, sqlTakeOver}, {&l.letGo, sqlLetGo}, {&l.heartbeat, sqlHeartbeat},
	} {
		if *s.stmt, err = l.conn.PrepareContext(ctx, s.text); err != nil {
			if e := pq.As(err); e != nil && e.Code.Class() == "42" && e.Code != "42P05" {
				return nil, refusedError{errors.Wrap(err, "locker: prepare statements: the tables are not those of SchemaSQL")}
			}
			return nil, poolerError(errors.Wrap(err, "locker: prepare statements"))
		}
	}
	return l, nil
}

// connectError marks the errors of a server that will not let us in, whatever
// the time.
func connectError(err error) error {
	err = errors.Wrap(err, "locker: connect to postgres")
	if e := pq.As(err); e != nil {
		switch {
		case e.Code.Class() == "28", // authentication
			e.Code == "3D000",      // no such database
			e.Code == "42501",      // no privilege to connect
			e.Code == "08P01",      // a proxy that refuses the startup packet
			e.Code == "42704",      // a parameter in the URI that the server does not know
			e.Code.Class() == "22": // or whose value it does not take
			return refusedError{err}
		}
	}
	return err
}

// check proves that the server can carry a session (C27), except for NOTIFY,
// and makes the schema if it is missing (C28).
func (l *link) check(ctx context.Context) error {
	var pid, version int
	var readOnly, schema bool
	var user string
	server := func() error {
		err := l.conn.QueryRowContext(ctx, sqlServer).Scan(&pid, &readOnly, &version, &l.commit, &user, &schema)
		return errors.Wrap(err, "locker: check server")
	}
	if err := server(); err != nil {
		return err
	}
	switch {
	case version < 140000:
		return refused("PostgreSQL 14 or later is needed, the server is %d.%d", version/10000, version%10000)
	case readOnly:
		return refused("the server is read-only (a standby, or default_transaction_read_only): name the primary, or all hosts with target_session_attrs=read-write")
	}
	if !schema {
		if err := l.makeSchema(ctx, user); err != nil {
			return err
		}
	}
	var allowed bool
	if err := l.conn.QueryRowContext(ctx, sqlPrivileges).Scan(&allowed); err != nil {
		return errors.Wrap(err, "locker: check privileges")
	}
	if !allowed {
		return refused("user %q needs SELECT and INSERT on env_locks and SELECT, INSERT and UPDATE on env_lock_state", user)
	}
	if l.pid = pid; server() != nil || pid != l.pid {
		return errPooler
	}
	return nil
}

var errPooler = refused("two statements reached two server sessions: a proxy in transaction-pooling mode is in between; connect to PostgreSQL directly or to a pool in session mode")

// poolerError marks the errors of prepared statements that are not in the
// session that we prepared them in, or are there though we did not.
func poolerError(err error) error {
	if e := pq.As(err); e != nil && (e.Code == "26000" || e.Code == "42P05") {
		return refusedError{errors.WithMessage(err, errPooler.Error())}
	}
	return err
}

// setUp prepares a session that has proved that it can work; before, a pooling
// proxy could hand the settings to somebody else.
func (l *link) setUp() error {
	limit := time.AfterFunc(openTimeout, l.kill)
	defer limit.Stop()
	ctx := context.Background()
	settings := sqlSettings
	if l.commit == "off" { // a token must be durable before it is given out
		settings += "; SET synchronous_commit = on"
	}
	_, err := l.conn.ExecContext(ctx, settings)
	return errors.Wrap(err, "locker: set up session")
}

// takeNumber makes the session known to others, once it is set up.
func (l *link) takeNumber() error {
	limit := time.AfterFunc(openTimeout, l.kill)
	defer limit.Stop()
	l.number = int32(randomKey()>>32) | 1
	_, err := l.conn.ExecContext(context.Background(), sessionLock, l.number)
	return errors.Wrap(err, "locker: set up session")
}

func (l *link) makeSchema(ctx context.Context, user string) error {
	tx, err := l.conn.BeginTx(ctx, nil)
	if err != nil {
		return errors.Wrap(err, "locker: make schema")
	}
	defer func() { _ = tx.Rollback() }() // after Commit it does nothing
	if _, err = tx.ExecContext(ctx, schemaLock); err == nil {
		_, err = tx.ExecContext(ctx, SchemaSQL)
	}
	if err == nil {
		err = tx.Commit()
	}
	if e := pq.As(err); e != nil && (e.Code == "42501" || e.Code == "3F000") {
		return refusedError{errors.Wrapf(err, "locker: make schema: user %q may not create tables; run the SQL in locker.SchemaSQL (schema.sql) once as a user who may", user)}
	}
	return errors.Wrap(err, "locker: make schema")
}

// Dial, DialTimeout and DialContext make the link lib/pq's dialer.
func (l *link) Dial(network, address string) (net.Conn, error) {
	return l.DialContext(context.Background(), network, address)
}

func (l *link) DialTimeout(network, address string, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return l.DialContext(ctx, network, address)
}

func (l *link) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
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
	l.socket = &watchedConn{Conn: conn}
	return l.socket, nil
}

var dialer = net.Dialer{KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: heartbeatInterval, Interval: heartbeatInterval, Count: 3}}

// kill closes the connection under whatever is going on on it. It may be called
// at any time, by anybody, more than once.
func (l *link) kill() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.killed = true
	if l.socket != nil {
		_ = l.socket.Close()
	}
}

// close ends the link: the server frees what it held.
func (l *link) close() {
	if l.conn != nil {
		_ = l.conn.Close()
	}
	_ = l.db.Close()
	l.kill()
}

// watchedConn lets the worker notice at once that the server closed the idle
// connection (C24): between two statements the worker reads ahead. It is used by
// the worker alone, except for its deadline and Close.
type watchedConn struct {
	net.Conn
	ahead []byte // what arrived between two statements
}

// watch reads until the read deadline, or answers why the connection ended.
func (c *watchedConn) watch() error {
	var buf [1024]byte
	for {
		n, err := c.Conn.Read(buf[:])
		c.ahead = append(c.ahead, buf[:n]...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (c *watchedConn) Read(p []byte) (int, error) {
	if len(c.ahead) == 0 {
		return c.Conn.Read(p)
	}
	n := copy(p, c.ahead)
	c.ahead = c.ahead[n:]
	return n, nil
}

// applicationName is what pg_stat_activity shows, unless the URI says
// otherwise.
func applicationName() string {
	name := "locker"
	if len(os.Args) > 0 {
		name += " " + os.Args[0][strings.LastIndexAny(os.Args[0], `/\`)+1:]
	}
	return name
}

var (
	hostName, _ = os.Hostname() // "" where the system has none
	processID   = os.Getpid()
)
