package locker

import (
	_ "embed"
	"fmt"
	"regexp"
	"strings"
	"time"

	"github.com/lib/pq"
)

// SchemaSQL is the SQL that creates what the postgres provider needs in its database: the tables
// env_locks, env_lock_state and env_lock_sessions, and the view env_lock_overview. It also upgrades
// the tables of an earlier version. It can be run again, and concurrently.
//
// The provider runs it on first use. If the provider's role lacks the privilege, the provider
// returns an error that names SchemaSQL. Then a role that has the privilege must run it once.
//
//go:embed schema.sql
var SchemaSQL string

// Every statement accepts arrays, so that it serves any number of locks. Statements that write need
// them sorted by key, so that two connections never lock rows in opposite order. Every statement
// can be repeated: a repeat that finds its work done changes nothing.
const (
	// A token and a claim's number are the server's clock in microseconds. The clock keeps them
	// growing where the row cannot: after a crash that forgot claims, or after the row was deleted.
	sqlClock = `(date_part('epoch', clock_timestamp()) * 1000000)::bigint`

	// The commit does not wait for the disk.
	sqlNoFlush = `set_config('synchronous_commit', 'off', true)`

	// True if the session of the newest claim lives. NULL if it has no row.
	sqlClaimerLives = `(SELECT NOT pg_try_advisory_xact_lock_shared(x.lock) FROM env_lock_sessions x WHERE x.id = s.claimer_session)`

	// The newest claim and the holder, in the form that decodeClaim reads.
	sqlNewest = `(SELECT json_build_object('id', s.claim_id, 'event', s.claim_event, 'labels', s.claim_labels,
        'since', s.claimed_at, 'host', x.host, 'pid', x.pid)::text
    FROM (SELECT) one LEFT JOIN env_lock_sessions x ON x.id = s.claimer_session)`
	sqlHolder = `(SELECT json_build_object('id', s.holder_id, 'event', s.holder_event, 'labels', s.holder_labels,
        'since', s.held_since, 'host', x.host, 'pid', x.pid, 'token', s.token)::text
    FROM (SELECT) one LEFT JOIN env_lock_sessions x ON x.id = s.holder_session)`

	// The number of holds in a row that were ended by a newer claim, after the present hold has
	// ended. A spared hold that ends before claims may notify it does not count.
	sqlStreak = `CASE WHEN s.holder_stop AND (s.spared_until IS NULL OR s.spared_until <= clock_timestamp()) THEN s.streak + 1 ELSE 0 END`

	sqlLookup = `
SELECT w.ord, e.lock_key
FROM unnest($1::text[], $2::integer[]) WITH ORDINALITY AS w(repo, pull_request, ord)
JOIN env_locks e ON e.repo = w.repo AND e.pull_request = w.pull_request`

	// Adds keys, and the rows that their first claims will need.
	sqlAddKeys = `
WITH added AS (
    INSERT INTO env_locks (repo, pull_request, lock_key)
    SELECT * FROM unnest($1::text[], $2::integer[], $3::bigint[])
    ON CONFLICT DO NOTHING
    RETURNING lock_key
)
INSERT INTO env_lock_state (lock_key) SELECT lock_key FROM added
ON CONFLICT DO NOTHING`

	// Makes all earlier commits durable. It locks nothing.
	sqlFlush = `SELECT pg_logical_emit_message(true, 'locker', '')`

	// Returns why claims were not announced: the pull request has another key, the row is missing,
	// or there is a newest claim that prevents it.
	sqlWhyNot = `
SELECT u.key, u.pull_request >= 0 AND NOT coalesce((
        SELECT e.repo = u.repo AND e.pull_request = u.pull_request FROM env_locks e WHERE e.lock_key = u.key), false),
    s.lock_key IS NULL, ` + sqlNewest + `, s.top_order, CASE WHEN s.claim_order = s.top_order THEN s.claimed_at END
FROM unnest($1::bigint[], $2::text[], $3::integer[]) AS u(key, repo, pull_request)
LEFT JOIN env_lock_state s ON s.lock_key = u.key`

	// Records that claims have given up, so that they no longer prevent their own redelivery.
	// The claim of a holder is open until the release.
	sqlWithdraw = `
UPDATE env_lock_state s SET claim_open = false
FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
WHERE s.lock_key = w.key AND s.claim_id = w.id AND s.claim_open AND s.holder_id IS DISTINCT FROM w.id
RETURNING s.lock_key, ` + sqlNoFlush

	// Takes free keys for claims that are not superseded. $8 and $9 are the session and its lock:
	// without the lock nothing is taken. A key is free if its row
	//
	//   1. names no holder, or
	//   2. names this claim, because the reply to an earlier attempt was lost, or came after its
	//      session was lost. A late attempt of an earlier session takes nothing back, or
	//   3. names a holder whose session has the lock that this process has watched being dead ($7),
	//      and which is dead now.
	//
	// The key's own lock excludes holders of the original library and other programs. $10 is set if
	// lockKeys has tried it already. A claim that skips ($12) leaves a key that another claim waits
	// for. $13 and $14 are the arguments of WithProgress.
	//
	// The commit is flushed, which makes the token durable, and with it every claim before. For a
	// key that was not taken the statement returns the number of its newest claim, its holder's
	// session and whether that lives. A session without a row counts as one with the longest timeout.
	sqlAcquire = `
WITH want AS MATERIALIZED (
    SELECT * FROM unnest($1::bigint[], $2::uuid[], $3::bigint[], $4::uuid[], $5::boolean[], $6::text[], $7::bigint[], $10::boolean[], $11::text[], $12::boolean[])
        AS w(key, id, claim, claim_id, first, event, dead, locked, labels, skip)
), granted AS (
    UPDATE env_lock_state s SET
        claim = CASE WHEN w.first THEN s.claim ELSE greatest(s.claim, w.claim) END,
        claim_id = CASE WHEN w.first THEN s.claim_id ELSE w.claim_id END,
        waiting = false,
        claim_open = s.claim_open OR s.claim_id = w.id,
        claimer_session = CASE WHEN s.claim_id = w.id THEN $8::bigint ELSE s.claimer_session END,
        token = CASE WHEN s.holder_id = w.id THEN s.token ELSE greatest(s.token + 1, ` + sqlClock + `) END,
        held_since = CASE WHEN s.holder_id = w.id THEN s.held_since ELSE clock_timestamp() END,
        holder_id = w.id, holder_session = $8::bigint, holder_event = w.event, holder_labels = w.labels::json,
        holder_stop = coalesce(s.holder_stop AND s.holder_id = w.id, false),
        streak = CASE WHEN s.holder_id IS NULL OR s.holder_id = w.id THEN s.streak ELSE ` + sqlStreak + ` END,
        spared_until = CASE WHEN s.holder_id = w.id THEN s.spared_until
            WHEN $13::integer <= CASE WHEN s.holder_id IS NULL THEN s.streak ELSE ` + sqlStreak + ` END THEN clock_timestamp() + $14::interval END
    FROM want w
    WHERE s.lock_key = w.key
        AND ` + sqlValid + `
        AND CASE
            WHEN w.skip AND s.claim_open AND s.claim_id <> w.id AND s.holder_id IS DISTINCT FROM w.id AND ` + sqlClaimerLives + ` THEN false
            WHEN s.holder_id IS NULL THEN coalesce(w.locked, pg_try_advisory_xact_lock(s.lock_key))
            WHEN s.holder_id = w.id AND s.holder_session <= $8::bigint THEN coalesce(w.locked, true)
            WHEN w.dead IS NULL THEN false
            WHEN w.dead <> coalesce((SELECT x.lock FROM env_lock_sessions x WHERE x.id = s.holder_session), s.holder_session, 0) THEN false
            WHEN NOT pg_try_advisory_xact_lock_shared(w.dead) THEN false
            ELSE coalesce(w.locked, pg_try_advisory_xact_lock(s.lock_key)) END
        AND (SELECT NOT pg_try_advisory_xact_lock_shared($9::bigint))
    RETURNING s.lock_key, s.claim, s.claim_id, s.token, s.spared_until IS NOT NULL AS spared
)
SELECT w.key, t.token, t.spared, t.lock_key IS NULL AND s.lock_key IS NULL,
    t.lock_key IS NOT NULL OR ` + sqlValid + `,
    coalesce(t.claim, s.claim), coalesce(t.claim_id, s.claim_id),
    s.holder_id IS NOT NULL,
    s.holder_id IS NULL OR s.claim_id = w.id AND (s.claimer_session IS DISTINCT FROM $8::bigint OR NOT s.claim_open),
    CASE WHEN s.holder_id IS NOT NULL THEN coalesce(x.lock, s.holder_session, 0) END,
    x.id IS NOT NULL,
    CASE WHEN s.holder_id IS NOT NULL THEN date_part('epoch', coalesce(x.timeout, (SELECT max(o.timeout) FROM env_lock_sessions o))) END,
    CASE WHEN s.holder_id IS NOT NULL THEN NOT pg_try_advisory_xact_lock_shared(coalesce(x.lock, s.holder_session, 0)) END,
    (SELECT NOT pg_try_advisory_xact_lock_shared($9::bigint))
FROM want w
LEFT JOIN granted t ON t.lock_key = w.key
LEFT JOIN env_lock_state s ON s.lock_key = w.key AND t.lock_key IS NULL
LEFT JOIN env_lock_sessions x ON x.id = s.holder_session`

	// True if a claim is not superseded.
	sqlValid = `(w.first OR s.claim < w.claim OR s.claim_id = w.id OR s.claim = w.claim AND s.claim_id = w.claim_id)`

	// Returns who holds keys, who waits for them, and which other program has their advisory locks,
	// for errors. The statements of this library have such a lock only for moments.
	sqlExplain = `
SELECT w.key, CASE WHEN s.claim_id <> '00000000-0000-0000-0000-000000000000' THEN ` + sqlNewest + ` END, s.claim_open AND ` + sqlClaimerLives + `,
    CASE WHEN s.holder_id IS NOT NULL THEN ` + sqlHolder + ` END,
    date_part('epoch', clock_timestamp() - s.held_since), CASE WHEN s.holder_id IS NOT NULL THEN NOT pg_try_advisory_xact_lock_shared(coalesce(x.lock, s.holder_session, 0)) END, f.pid, f.application_name, f.usename
FROM unnest($1::bigint[]) AS w(key)
LEFT JOIN env_lock_state s ON s.lock_key = w.key
LEFT JOIN env_lock_sessions x ON x.id = s.holder_session
LEFT JOIN LATERAL (
    SELECT l.pid, a.application_name, a.usename::text AS usename FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
    WHERE s.holder_id IS NULL AND l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND l.pid <> pg_backend_pid()
        AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
        AND (l.classid::bigint << 32) | l.objid::bigint = w.key
        AND a.query NOT LIKE '%env_lock_state%'
    LIMIT 1) f ON true`

	// With WithOriginalReplicas: returns the keys whose rows allow a claim to try to take them.
	sqlTakeable = `
SELECT s.lock_key
FROM unnest($1::bigint[], $2::uuid[], $3::bigint[]) AS w(key, id, dead)
JOIN env_lock_state s ON s.lock_key = w.key
WHERE s.holder_id IS NULL OR s.holder_id = w.id
    OR w.dead = coalesce((SELECT x.lock FROM env_lock_sessions x WHERE x.id = s.holder_session), s.holder_session, 0)`

	// Creates missing rows. If env_locks has the key, its row existed and was deleted, perhaps
	// while the key was held. Such a row is created as held by a session that does not exist ($2).
	// Then a successor waits for the session timeout, and an old holder is notified before that by
	// the check of its rows.
	sqlEnsure = `
INSERT INTO env_lock_state (lock_key, holder_id, holder_session, holder_event, held_since)
SELECT k.key, CASE WHEN k.known THEN gen_random_uuid() END, CASE WHEN k.known THEN k.session END,
    CASE WHEN k.known THEN 'unknown: the row of the key was deleted' END, CASE WHEN k.known THEN clock_timestamp() END
FROM (
    SELECT u.key, u.session, $3::boolean AND EXISTS (SELECT FROM env_locks e WHERE e.lock_key = u.key) AS known
    FROM unnest($1::bigint[], $2::bigint[]) AS u(key, session)
) k
ON CONFLICT DO NOTHING`

	// Records that a claim waits, where the row does not show it, so that the release sends a
	// notification. Reports whether that was necessary. A holder that the row does not name is one
	// of the original library: it listens on a channel that is named by the key, but only some time
	// after it has the key. So it is notified with every attempt, unless the claim lets it finish
	// ($5). A claim that continues to wait in a new session records that session.
	sqlWait = `
WITH asked AS (
    UPDATE env_lock_state s SET waiting = true,
        claim_open = s.claim_open OR s.claim_id = w.id,
        claimer_session = CASE WHEN s.claim_id = w.id THEN $3::bigint ELSE s.claimer_session END
    FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
    WHERE s.lock_key = w.key
        AND (NOT s.waiting OR s.claim_id = w.id AND (s.claimer_session IS DISTINCT FROM $3::bigint OR NOT s.claim_open))
    RETURNING s.lock_key
)
SELECT s.lock_key, a.lock_key IS NOT NULL, ` + sqlNoFlush + `,
    CASE WHEN NOT $4::boolean AND s.holder_id IS NULL AND s.claim_open AND w.finish IS NOT TRUE AND s.claim_id = w.id THEN pg_notify(s.lock_key::text,
        format('{"id":"%s","event":%s,"lockKey":%s}', s.claim_id, to_json(s.claim_event), s.lock_key))::text END
FROM unnest($1::bigint[], $2::uuid[], $5::boolean[]) AS w(key, id, finish)
JOIN env_lock_state s ON s.lock_key = w.key
LEFT JOIN asked a ON a.lock_key = s.lock_key`

	// If the row of the first key does not match, the commit is flushed, which does no harm.
	sqlRelease = `
UPDATE env_lock_state s
SET holder_id = NULL, holder_session = NULL, holder_event = NULL, holder_labels = NULL, held_since = NULL,
    holder_stop = false, spared_until = NULL, streak = ` + sqlStreak + `,
    claim_open = s.claim_open AND s.claim_id <> w.id
FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
WHERE s.lock_key = w.key AND s.holder_id = w.id
RETURNING s.lock_key,
    CASE WHEN s.lock_key = ($1::bigint[])[1] THEN ` + sqlNoFlush + ` END,
    CASE WHEN NOT $3::boolean AND (s.waiting OR s.claim_id <> w.id) THEN
        pg_notify('` + notifyChannel + `', format('` + payloadReleased + `', s.lock_key))::text END`

	// Returns the holds that their rows no longer name, and those that a claim has asked to stop.
	// This repairs a lost NOTIFY. The first row reports whether this server sees the session live.
	sqlCheck = `
SELECT NOT pg_try_advisory_xact_lock_shared($4::bigint)
        AND EXISTS (SELECT FROM env_lock_sessions x WHERE x.id = $3::bigint AND x.lock = $4::bigint),
    NULL::bigint, NULL::uuid, NULL::bigint, NULL::uuid, NULL::text
UNION ALL
SELECT s.holder_id IS NOT DISTINCT FROM w.id AND s.holder_session IS NOT DISTINCT FROM $3::bigint,
    w.key, w.id, s.claim, s.claim_id, CASE WHEN s.holder_stop THEN ` + sqlNewest + ` END
FROM unnest($1::bigint[], $2::uuid[]) AS w(key, id)
LEFT JOIN env_lock_state s ON s.lock_key = w.key
WHERE s.holder_stop OR s.holder_id IS DISTINCT FROM w.id OR s.holder_session IS DISTINCT FROM $3::bigint`

	// Returns the keys that a session holds and waits for according to the rows.
	sqlHolds = `
SELECT lock_key, holder_id, true FROM env_lock_state WHERE holder_session = $1::bigint AND holder_id IS NOT NULL
UNION ALL
SELECT lock_key, claim_id, false FROM env_lock_state
WHERE claimer_session = $1::bigint AND claim_open AND holder_id IS DISTINCT FROM claim_id`

	// sqlDeadSessions returns sessions that are dead now, of some that are chosen at random. sqlSweep
	// deletes those that this process has watched being dead, and that hold nothing. Neither finds
	// any on a server that does not see this process's own session ($1): there, every session seems
	// dead.
	sqlDeadSessions = `
SELECT x.lock, date_part('epoch', x.timeout)
FROM (SELECT o.lock, o.timeout FROM env_lock_sessions o WHERE o.lock <> $1::bigint ORDER BY random() LIMIT 500) x
WHERE (SELECT NOT pg_try_advisory_xact_lock_shared($1::bigint)) AND pg_try_advisory_xact_lock_shared(x.lock)`
	sqlSweep = `
DELETE FROM env_lock_sessions x
WHERE (SELECT NOT pg_try_advisory_xact_lock_shared($1::bigint))
    AND x.lock = ANY ($2::bigint[]) AND pg_try_advisory_xact_lock_shared(x.lock)
    AND NOT EXISTS (SELECT FROM env_lock_state s WHERE s.holder_session = x.id AND s.holder_id IS NOT NULL)`

	sqlTime = `SELECT date_part('epoch', clock_timestamp())`

	// Writes, checks that the session lives, and sends a notification. It returns no row while the
	// session is not connected.
	sqlPing = `
SELECT pg_notify('` + notifyChannel + `', $3) FROM env_lock_sessions x
WHERE x.id = $1::bigint AND x.lock = $2::bigint AND NOT pg_try_advisory_xact_lock_shared(x.lock)
FOR UPDATE`
	// Returns a pull request with two rows, if there is one: an index whose order is no longer that
	// of its collation does not find a row. The statement reads the table and not that index. It
	// reads nothing if the order cannot change.
	sqlTwins = `
SELECT e.repo COLLATE "C", e.pull_request FROM env_locks e
WHERE (SELECT a.attcollation FROM pg_attribute a WHERE a.attrelid = to_regclass('env_locks') AND a.attname = 'repo')
    NOT IN (SELECT c.oid FROM pg_collation c WHERE c.collname IN ('C', 'POSIX'))
GROUP BY e.repo COLLATE "C", e.pull_request HAVING min(e.lock_key) <> max(e.lock_key) LIMIT 1`

	sqlListLocks = `
SELECT lock_key, coalesce(repo, ''), coalesce(pull_request, 0),
    coalesce(holder_event, ''), coalesce(holder_host, ''), coalesce(holder_pid, 0), coalesce(holder_application, ''),
    held_since, token, alive,
    newest_event, coalesce(newest_host, ''), coalesce(newest_pid, 0), coalesce(newest_application, ''), newest_at, waiting,
    coalesce(holder_labels::text, ''), coalesce(newest_labels::text, ''), stop_asked, spared_until, streak
FROM env_lock_overview ORDER BY repo, pull_request, lock_key`

	sqlResetSequence = `
UPDATE env_lock_state s SET top_order = NULL FROM env_locks e
WHERE e.repo = $1 AND e.pull_request = $2 AND s.lock_key = e.lock_key
RETURNING s.lock_key`

	sqlHolderOf = `SELECT lock_key FROM env_lock_overview WHERE repo = $1 AND pull_request = $2 AND alive`

	sqlEncoding = `SHOW server_encoding`

	sqlNotify = `SELECT pg_notify('` + notifyChannel + `', $1)`

	sqlServer = `
SELECT pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on',
    current_user,
    to_regclass('env_locks') IS NOT NULL AND to_regclass('env_lock_sessions') IS NOT NULL
        AND EXISTS (SELECT FROM pg_attribute WHERE attrelid = to_regclass('env_lock_state') AND attname = 'holder_stop'),
    to_regclass('env_lock_overview') IS NOT NULL`

	sqlPrivileges = `
SELECT has_table_privilege('env_locks', 'SELECT') AND has_table_privilege('env_locks', 'INSERT')
    AND has_table_privilege('env_lock_state', 'SELECT') AND has_table_privilege('env_lock_state', 'INSERT')
    AND has_table_privilege('env_lock_state', 'UPDATE')
    AND has_table_privilege('env_lock_sessions', 'SELECT') AND has_table_privilege('env_lock_sessions', 'INSERT')
    AND has_table_privilege('env_lock_sessions', 'UPDATE') AND has_table_privilege('env_lock_sessions', 'DELETE')`

	// Makes concurrent starts create the schema one after the other. No key of a user is in the
	// two-key space of advisory locks.
	sqlSchemaLock = `SELECT pg_advisory_xact_lock(1819239269, 1919116148)`

	// A server process that waits for a lock does not notice that its client has left. So the server
	// ends the wait before the client would leave (answerTimeout).
	sqlSchemaLimits = `SET LOCAL lock_timeout = '3s'; SET LOCAL statement_timeout = '5s'; `

	// Makes the transaction create what is missing next to the tables that exist. Otherwise it might
	// create it in an earlier schema of the search path, where new tables would hide the others.
	sqlSchemaPath = `
SELECT set_config('search_path', quote_ident(n.nspname), true)
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE c.oid = coalesce(to_regclass('env_lock_state'), to_regclass('env_locks'), to_regclass('env_lock_sessions'))`

	sqlListen    = `LISTEN ` + notifyChannel
	sqlListening = `SELECT 1 / (EXISTS (SELECT FROM pg_listening_channels() c WHERE c = '` + notifyChannel + `'))::int`
)

// sqlAnnounce returns the statement that makes claims the newest of their keys. It has two forms.
// The full one is for batches in which a claim has a sequence number or labels or lets the holder
// finish, and for WithProgress. The server takes a tenth of a cycle to set up its additional parts.
//
//  1. The claim's number is assigned under the row lock, so the row decides the order.
//  2. A claim that takes ($6) gets the key immediately if the row names no holder and no waiter.
//     The row decides that as well. The key's own lock excludes holders of the original library.
//  3. A claim that preempts records in the row that the holder must stop. A holder that announces
//     its claim again is the newest, and continues. In the row of a free key the columns of the
//     hold do not count: an operator, or a replica of an earlier version, may have freed it.
//  4. Every copy of a claim carries the time at which its caller asked for it, on the server's
//     clock ($7). A copy that arrives late, or is repeated ($12), makes nothing newer than it is.
//     If the claim is the newest already, it stays as it is. If the newest claim was asked for
//     later, the copy is superseded. A newest claim from the future is one of another clock, and
//     does not count.
//  5. A claim with a sequence number is rejected if a claim with a higher one was announced, or if
//     one with the same number still waits or holds. A session that the server does not see at
//     this moment does not count, except the session that announces.
//  6. A claim for a pull request that has another key is dropped.
//
// A claim that is not announced has no row in the result, and sqlWhyNot returns the reason. A
// commit that only takes keys is flushed. A commit that notifies is not, because notifying
// transactions commit one after the other on the whole server. The fifth column is set if the
// commit is not flushed. If that commit took a key nevertheless, sqlFlush follows.
func sqlAnnounce(full bool) string {
	const (
		grants = `(w.got AND s.holder_id IS NULL AND NOT s.waiting OR w.acquire AND s.holder_id = w.id AND s.holder_session = $8::bigint)`
		again  = `w.late AND s.claim_id = w.id`
	)
	names, arrays, columns := "", "", ""
	set, labels, stops := "claim_order = NULL, spared_until = CASE WHEN s.holder_id IS NOT NULL THEN s.spared_until END", "NULL", "true"
	payload := pq.QuoteLiteral(payloadPlain) + `, s.lock_key, s.claim, s.claim_id, to_json(s.claim_event)`
	condition := ` AND (NOT w.late OR s.claim_id = w.id OR s.claimed_at IS NULL
        OR s.claimed_at <= w.asked OR s.claimed_at > clock_timestamp())`
	if full {
		names, arrays, columns = ", ord, labels, finish", ", $13::bigint[], $14::text[], $15::boolean[]", " u.ord, u.labels::json AS labels, u.finish,"
		set, labels, stops = `claim_order = w.ord, top_order = coalesce(w.ord, s.top_order),
    spared_until = CASE WHEN s.holder_id IS NOT NULL THEN s.spared_until
        WHEN `+grants+` AND $16::integer <= s.streak THEN statement_timestamp() + $17::interval END`, "w.labels", "w.finish IS NOT TRUE"
		payload = pq.QuoteLiteral(payloadFull) + `, s.lock_key, s.claim, s.claim_id, to_json(s.claim_event),
            coalesce(s.claim_labels::text, 'null'), to_json(w.finish IS TRUE)`
		condition = strings.Replace(condition, "(NOT w.late", "(w.ord IS NOT NULL OR NOT w.late", 1) +
			` AND (w.ord IS NULL OR s.top_order IS NULL OR w.ord > s.top_order
        OR w.ord = s.top_order AND (s.claim_id = w.id OR NOT s.claim_open OR s.claim_order IS DISTINCT FROM w.ord
            OR s.claimer_session IS DISTINCT FROM $8::bigint AND ` + sqlClaimerLives + ` IS NOT TRUE))`
	}
	return `
WITH want AS MATERIALIZED (
    SELECT u.key, u.id, u.event, u.acquire, least(to_timestamp(u.asked), statement_timestamp()) AS asked,
        coalesce(u.repeated, false) OR statement_timestamp() - to_timestamp(u.asked) > $11::interval AS late,` + columns + `
        CASE WHEN u.acquire AND s.holder_id IS NULL AND NOT s.waiting AND (SELECT NOT pg_try_advisory_xact_lock_shared($9::bigint))
            THEN pg_try_advisory_xact_lock(u.key) ELSE false END AS got,
        s.holder_id = u.id AND s.claim_open AND s.claim_id <> u.id AS waited
    FROM unnest($1::bigint[], $2::uuid[], $3::text[], $4::text[], $5::integer[], $6::boolean[], $7::float8[], $12::boolean[]` + arrays + `)
        AS u(key, id, event, repo, pull_request, acquire, asked, repeated` + names + `)
    JOIN env_lock_state s ON s.lock_key = u.key
    LEFT JOIN env_locks e ON e.lock_key = u.key
    WHERE u.pull_request < 0 OR e.repo = u.repo AND e.pull_request = u.pull_request
)
UPDATE env_lock_state s SET
    claim = CASE WHEN ` + again + ` THEN s.claim ELSE greatest(s.claim + 1, ` + sqlClock + `) END,
    claim_id = w.id,
    claim_event = w.event,
    claim_labels = ` + labels + `,
    claimed_at = w.asked,
    ` + set + `,
    claim_open = true,
    claimer_session = $8::bigint,
    token = CASE WHEN ` + grants + ` AND s.holder_id IS NULL THEN greatest(s.token + 1, ` + sqlClock + `) ELSE s.token END,
    held_since = CASE WHEN ` + grants + ` AND s.holder_id IS NULL THEN statement_timestamp() ELSE s.held_since END,
    holder_id = CASE WHEN ` + grants + ` THEN w.id ELSE s.holder_id END,
    holder_session = CASE WHEN ` + grants + ` THEN $8::bigint ELSE s.holder_session END,
    holder_event = CASE WHEN ` + grants + ` THEN w.event ELSE s.holder_event END,
    holder_labels = CASE WHEN ` + grants + ` THEN ` + labels + ` ELSE s.holder_labels END,
    holder_stop = s.holder_id IS NOT NULL AND CASE WHEN ` + again + ` THEN s.holder_stop
        ELSE s.holder_id <> w.id AND (s.holder_stop OR ` + stops + `) END
FROM want w
WHERE s.lock_key = w.key` + condition + `
RETURNING s.lock_key, s.claim, CASE WHEN w.acquire AND s.holder_id = w.id AND s.holder_session = $8::bigint THEN s.token END,
    s.spared_until IS NOT NULL,
    CASE WHEN s.waiting OR w.waited OR s.holder_id IS DISTINCT FROM w.id THEN ` + sqlNoFlush + ` END,
    CASE WHEN NOT $10::boolean AND (s.waiting OR w.waited OR s.holder_id <> w.id) THEN pg_notify('` + notifyChannel + `',
        format(` + payload + `))::text END`
}

// sqlForOne maps the statements of a cycle to their forms for one row, with scalars instead of
// arrays. The server needs a tenth of such a statement to set up the arrays.
var sqlForOne = func() map[string]string {
	forms := map[string]string{}
	for _, text := range []string{sqlAnnouncePlain, sqlAnnounceFull, sqlAcquire, sqlRelease} {
		forms[text] = forOne(text)
	}
	return forms
}()

var unnested = regexp.MustCompile(`unnest\([^)]*\)`)

func forOne(text string) string {
	text = strings.ReplaceAll(text, "($1::bigint[])[1]", "$1::bigint")
	return unnested.ReplaceAllStringFunc(text, func(rows string) string {
		return "(SELECT " + strings.ReplaceAll(strings.TrimPrefix(rows, "unnest("), "[]", "")
	})
}

// settings returns the query that sets up every connection of a session with the timeout t:
//
//   - The server ends a connection that is silent, and one whose client does not receive what it is
//     sent.
//   - A statement that waits for a locked row fails soon and is repeated, so that other keys do not
//     wait for it.
//   - Plans use indexes, whatever the statistics are.
//   - A commit is flushed, because a token must be durable before it is used.
func settings(t time.Duration) string {
	var columns []string
	for _, s := range [][2]string{
		{"lock_timeout", "500ms"}, {"statement_timeout", "3s"},
		{"idle_session_timeout", milliseconds(lease(t))}, {"idle_in_transaction_session_timeout", milliseconds(lease(t))},
		{"tcp_keepalives_idle", "3"}, {"tcp_keepalives_interval", "3"}, {"tcp_keepalives_count", "3"},
		{"tcp_user_timeout", milliseconds(lease(t))},
		{"default_transaction_isolation", "read committed"}, {"jit", "off"}, {"plan_cache_mode", "force_generic_plan"},
		{"enable_seqscan", "off"}, {"enable_hashjoin", "off"}, {"enable_mergejoin", "off"},
	} {
		columns = append(columns, fmt.Sprintf("set_config('%s', '%s', false)", s[0], s[1]))
	}
	return "SELECT " + strings.Join(columns, ", ") +
		", CASE WHEN current_setting('synchronous_commit') = 'off' THEN set_config('synchronous_commit', 'on', false) END"
}

func milliseconds(d time.Duration) string { return fmt.Sprintf("%dms", d.Milliseconds()) }

// The statements of the session's own connection. That connection returns errors but no rows, so a
// condition that is false becomes an error: a division by zero if this backend does not have the
// session's lock, and the logarithm of zero if the server does not accept writes.
const (
	sqlSessionLock   = `, pg_advisory_lock(%d)`
	sqlSessionEnd    = `DELETE FROM env_lock_sessions WHERE id = %d RETURNING ` + sqlNoFlush
	sqlSessionUpsert = `
INSERT INTO env_lock_sessions AS x (id, lock, connection, timeout, host, pid, application)
VALUES (%d, %d, %d, interval '%d milliseconds', %s, %d, current_setting('application_name'))
ON CONFLICT (id) DO UPDATE SET lock = excluded.lock, connection = excluded.connection
WHERE x.connection < excluded.connection`

	sqlHeartbeat = `
SELECT 1 / (EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid() AND granted
        AND objsubid = 1 AND (classid::bigint << 32) | objid::bigint = %d))::int,
    ln(1 - (pg_is_in_recovery() OR current_setting('transaction_read_only') = 'on')::int)`

	// With WithOriginalReplicas. The statement fails with an error about a text that is not a
	// number. The text lists the keys whose locks others have.
	sqlKeyLock = `
SELECT ('locks that others have: ' || string_agg(k::text, ',') || ';')::integer
FROM unnest('{%s}'::bigint[]) AS k WHERE NOT pg_try_advisory_lock(k)`
	sqlKeyUnlock = `SELECT pg_advisory_unlock(k) FROM unnest('{%s}'::bigint[]) AS k`

	// sqlSessionKill ends the connections that have the given session locks, and sqlSessionDead
	// waits for that. Other connections have such a lock only for moments, and shared. A role may end
	// the connections that it has logged in, which the role of "SET ROLE" may not.
	sqlSessionKill = `
WITH login AS MATERIALIZED (SELECT set_config('role', 'none', true) AS role)
SELECT pg_terminate_backend(pid) FROM login JOIN pg_locks ON role = 'none'
WHERE locktype = 'advisory' AND granted AND mode = 'ExclusiveLock' AND objsubid = 1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
    AND (classid::bigint << 32) | objid::bigint = ANY ('{%s}'::bigint[])`
	sqlSessionDead = `SELECT pg_advisory_xact_lock_shared(k) FROM unnest('{%s}'::bigint[]) AS k`
)

// sessionUpsert returns the statement that writes a session's row. For a session without holds it
// is not flushed: the first key that is taken makes it durable. After a reconnect it is flushed.
// Otherwise a crash could restore the old lock, which others may have watched already.
func sessionUpsert(s sessionRef, connection int64, t time.Duration, reconnect bool) string {
	text := fmt.Sprintf(sqlSessionUpsert, s.id, s.lock, connection, t.Milliseconds(), pq.QuoteLiteral(hostName), processID)
	if !reconnect {
		text += " RETURNING " + sqlNoFlush
	}
	return text
}

// statementNames are the names of the links' statements for a [Tracer].
var statementNames = map[string]string{
	sqlLookup:        "look up keys",
	sqlAddKeys:       "add keys",
	sqlAnnouncePlain: "announce",
	sqlAnnounceFull:  "announce in full",
	sqlExplain:       "explain",
	sqlFlush:         "flush",
	sqlWhyNot:        "say why not announced",
	sqlWithdraw:      "withdraw",
	sqlAcquire:       "acquire",
	sqlTakeable:      "look for takeable keys",
	sqlEnsure:        "add rows",
	sqlWait:          "wait",
	sqlRelease:       "release keys",
	sqlTime:          "ask for the time",
	sqlTwins:         "look for twins",
	sqlPing:          "ping",
	sqlResetSequence: "reset sequence",
	sqlNotify:        "notify",
	sqlListLocks:     "list locks",
	sqlHolderOf:      "find holder",
	sqlCheck:         "check rows",
	sqlHolds:         "list holds",
	sqlDeadSessions:  "list dead sessions",
	sqlSweep:         "sweep",
}
