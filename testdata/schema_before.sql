-- The schema of github.com/preemptable/locker. The library runs this itself on
-- first use when something is missing and it has the privilege to create it. It
-- is safe to run again.

-- Which key a pull request has. Rows belong to the operator: a row that is
-- deleted is made again, with another key.
CREATE TABLE IF NOT EXISTS env_locks (
    lock_key     bigint  NOT NULL UNIQUE,
    repo         text    NOT NULL,
    pull_request integer NOT NULL,
    PRIMARY KEY (repo, pull_request)
);

-- One row per key that was ever claimed. Only lock_key is indexed and half of
-- each page stays free, so that updates stay on their page (HOT).
CREATE TABLE IF NOT EXISTS env_lock_state (
    lock_key     bigint  PRIMARY KEY,
    -- The newest claim: no older one can acquire the key. Claims are numbered by
    -- the clock, in microseconds, but always upwards.
    claim        bigint  NOT NULL DEFAULT 0,
    claim_id     uuid    NOT NULL DEFAULT '00000000-0000-0000-0000-000000000000',
    claim_event  text    NOT NULL DEFAULT '',
    claimed_at   timestamptz,
    -- The order that the newest claim was given by its caller, if any, and the
    -- highest that any claim was given.
    claim_order  bigint,
    top_order    bigint,
    -- Whether the newest claim's lock still waits or holds, as long as its
    -- session lives: that session keeps an advisory lock on this number.
    claim_open   boolean NOT NULL DEFAULT false,
    claim_session integer NOT NULL DEFAULT 0,
    claim_host   text    NOT NULL DEFAULT '',
    claim_pid    integer NOT NULL DEFAULT 0,
    -- A waiter asks to be told of a release that nobody would announce otherwise.
    waiting      boolean NOT NULL DEFAULT false,
    -- The fencing token of the last hold, numbered like the claims.
    token        bigint  NOT NULL DEFAULT 0,
    -- The last hold; all NULL once it ended cleanly.
    holder_id    uuid,
    holder_event text,
    holder_host  text,
    holder_pid   integer,
    held_since   timestamptz,
    -- When a hold was last taken over from a holder whose session had died.
    unclean_at   timestamptz
) WITH (fillfactor = 50);

-- For people and dashboards: who holds, who waits, and whether the holder's
-- session lives.
CREATE OR REPLACE VIEW env_lock_overview AS
WITH locks AS (
    SELECT DISTINCT l.objsubid, l.classid::bigint AS high, l.objid::bigint AS low
    FROM pg_locks l
    WHERE l.locktype = 'advisory' AND l.granted
        AND l.database = (SELECT d.oid FROM pg_database d WHERE d.datname = current_database())
), held AS (
    SELECT (high << 32) | low AS lock_key FROM locks WHERE objsubid = 1
), sessions AS (
    SELECT low AS number FROM locks WHERE objsubid = 2 AND high = 1819239270
)
SELECT s.lock_key, e.repo, e.pull_request,
    s.holder_event, s.holder_host, s.holder_pid, s.held_since, s.token,
    s.holder_id IS NOT NULL AND held.lock_key IS NOT NULL AS alive,
    s.claim_event AS newest_event, s.claim_host AS newest_host, s.claim_pid AS newest_pid, s.claimed_at AS newest_at,
    s.claim_open AND s.claim_id IS DISTINCT FROM s.holder_id AND sessions.number IS NOT NULL AS waiting
FROM env_lock_state s
LEFT JOIN env_locks e ON e.lock_key = s.lock_key
LEFT JOIN held ON held.lock_key = s.lock_key
LEFT JOIN sessions ON sessions.number = s.claim_session
WHERE s.holder_id IS NOT NULL OR s.claim_open AND sessions.number IS NOT NULL;
