-- The schema of github.com/preemptable/locker. The library runs this file on
-- first use if a part is missing and its role has the privilege. The file also
-- upgrades the tables of an earlier version. It can be run again, and
-- concurrently. The first of the two locks is for a client that commits each
-- statement, the second for one that commits all of them together.
SELECT pg_advisory_lock(1819239269, 1919116148), pg_advisory_xact_lock(1819239269, 1919116148);

-- The key of each pull request. Rows belong to the operator. A row that is
-- deleted is created again, with another key.
CREATE TABLE IF NOT EXISTS env_locks (
    lock_key     bigint  NOT NULL UNIQUE,
    repo         text    COLLATE "C" NOT NULL,
    pull_request integer NOT NULL,
    PRIMARY KEY (repo, pull_request)
);

-- One row for each provider that is in use. Its process lives as long as one of
-- its connections has the advisory lock with the number in "lock". After each
-- reconnect this is another number, and no number is ever used again.
CREATE TABLE IF NOT EXISTS env_lock_sessions (
    -- A later session of the same provider has a larger one.
    id          bigint PRIMARY KEY,
    lock        bigint NOT NULL,
    -- The number of the present connection among those of the session. Because
    -- of it a late statement of an earlier connection changes nothing.
    connection  bigint NOT NULL DEFAULT 0,
    -- The session timeout: how long a successor has to watch the session being
    -- dead.
    timeout     interval NOT NULL,
    host        text NOT NULL DEFAULT '',
    pid         integer NOT NULL DEFAULT 0,
    application text NOT NULL DEFAULT '',
    started_at  timestamptz NOT NULL DEFAULT now()
);

-- One row for each key that was ever claimed. Only lock_key is indexed and half
-- of each page stays free, so that updates stay on their page (HOT).
CREATE TABLE IF NOT EXISTS env_lock_state (
    lock_key     bigint  PRIMARY KEY,
    -- The newest claim: no older one can acquire the key. Claims are numbered by
    -- the clock, in microseconds, but a number is always larger than the last one.
    claim        bigint  NOT NULL DEFAULT 0,
    claim_id     uuid    NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    claim_event  text    NOT NULL DEFAULT '',
    claim_labels json,
    -- When the caller asked for the newest claim.
    claimed_at   timestamptz,
    -- The sequence number that the caller gave the newest claim, if any, and the
    -- highest one that any claim was given.
    claim_order  bigint,
    top_order    bigint,
    -- Whether the newest claim's lock still waits or holds, as long as its
    -- session lives.
    claim_open   boolean NOT NULL DEFAULT false,
    claimer_session bigint,
    -- Whether a release must send a notification although the rest of the row
    -- shows no waiter.
    waiting      boolean NOT NULL DEFAULT false,
    -- The fencing token of the last hold. Tokens are numbered like the claims.
    token        bigint  NOT NULL DEFAULT 0,
    -- The hold. All are NULL while the key is free.
    holder_id    uuid,
    holder_session bigint,
    holder_event text,
    held_since   timestamptz,
    holder_labels json,
    -- Whether a claim has asked the holder to stop.
    holder_stop  boolean NOT NULL DEFAULT false,
    -- Claims do not notify the holder before this time. See WithProgress.
    spared_until timestamptz,
    -- How many holds in a row were ended by a newer claim.
    streak       integer NOT NULL DEFAULT 0
) WITH (fillfactor = 50);

-- Columns that an earlier version did not have.
ALTER TABLE env_lock_state ADD COLUMN IF NOT EXISTS claimer_session bigint;
ALTER TABLE env_lock_state ADD COLUMN IF NOT EXISTS holder_session bigint;
ALTER TABLE env_lock_state
    ADD COLUMN IF NOT EXISTS claim_labels json, ADD COLUMN IF NOT EXISTS holder_labels json,
    ADD COLUMN IF NOT EXISTS holder_stop boolean NOT NULL DEFAULT false, ADD COLUMN IF NOT EXISTS spared_until timestamptz,
    ADD COLUMN IF NOT EXISTS streak integer NOT NULL DEFAULT 0;

-- That version had no sessions. Its holds are assigned to a session that does
-- not exist, so that a successor waits for the longest session timeout, but at
-- least 10 s.
UPDATE env_lock_state SET holder_session = (random() * 9000000000000000000)::bigint + 1
WHERE holder_id IS NOT NULL AND holder_session IS NULL;

-- The keys of the original library start free. A key that has no row later is a
-- key whose row was deleted.
INSERT INTO env_lock_state (lock_key)
SELECT e.lock_key FROM env_locks e WHERE NOT EXISTS (SELECT FROM env_lock_sessions)
ON CONFLICT DO NOTHING;

-- For people and dashboards: the holder, the newest claim if it waits, and
-- whether the sessions of both live. A session that is not alive has no
-- connection: its process has crashed, or it is about to reconnect.
CREATE OR REPLACE VIEW env_lock_overview AS
WITH sessions AS (
    SELECT x.*, x.lock IN (
        SELECT (l.classid::bigint << 32) | l.objid::bigint FROM pg_locks l
        WHERE l.locktype = 'advisory' AND l.granted AND l.mode = 'ExclusiveLock' AND l.objsubid = 1
            AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())) AS alive
    FROM env_lock_sessions x
)
SELECT s.lock_key, e.repo, e.pull_request,
    s.holder_event, h.host AS holder_host, h.pid AS holder_pid, s.held_since, s.token,
    s.holder_id IS NOT NULL AND coalesce(h.alive, false) AS alive,
    s.claim_event AS newest_event, c.host AS newest_host, c.pid AS newest_pid, s.claimed_at AS newest_at,
    s.claim_open AND s.claim_id IS DISTINCT FROM s.holder_id AND coalesce(c.alive, false) AS waiting,
    h.application AS holder_application, s.holder_session, c.application AS newest_application,
    s.holder_labels, s.claim_labels AS newest_labels, s.holder_stop AS stop_asked, s.spared_until, s.streak
FROM env_lock_state s
LEFT JOIN env_locks e ON e.lock_key = s.lock_key
LEFT JOIN sessions h ON h.id = s.holder_session
LEFT JOIN sessions c ON c.id = s.claimer_session
WHERE s.holder_id IS NOT NULL OR s.claim_open AND coalesce(c.alive, false);

-- Columns that an earlier version had.
ALTER TABLE env_lock_state
    DROP COLUMN IF EXISTS claim_session, DROP COLUMN IF EXISTS claim_host, DROP COLUMN IF EXISTS claim_pid,
    DROP COLUMN IF EXISTS holder_host, DROP COLUMN IF EXISTS holder_pid, DROP COLUMN IF EXISTS unclean_at;

SELECT pg_advisory_unlock(1819239269, 1919116148);
