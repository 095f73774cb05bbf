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
