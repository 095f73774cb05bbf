// Package locker is a distributed lock on PostgreSQL for work of which only the
// newest may run.
//
// # What it is for
//
// A CI/CD service receives a webhook for every push to a pull request, and each
// one starts minutes of work on the same environment. Only one may run at a time,
// and it should be the newest: an older one that still waits should leave at
// once, and the one that runs should be told to stop. Several replicas of the
// service share one PostgreSQL and nothing else.
//
//	A locks ──────── runs ── told to stop ── cleans up ── releases
//	B        claims ── waits ── leaves: superseded by C
//	C                    claims ── waits ──────────────── locks ── runs
//
// With a PreemptiveLockerFactory a handler says only this:
//
//	err := newLocker("org/repo", 7, "push 1f2e3d4").Do(ctx, func(ctx context.Context) error {
//		return deploy(ctx) // ctx is cancelled when a newer push arrives
//	})
//
// NewPostgresPreemptiveLockerFactory makes such a factory for production,
// NewFakePreemptiveLockerFactory one for unit tests, with the same behaviour and
// no server.
//
// # How it works
//
// One row per key says which claim is the newest. The statement that acquires
// the lock checks it, so that no lost message can let an older claim win; NOTIFY
// only makes it fast. A session-level advisory lock says who holds the key, and
// dies with the session. All locks of a provider share one session, of one or
// two connections, and one that listens.
//
// A lock is in one of five phases and only ever moves forward:
//
//	fresh ──Lock──▶ waiting ──granted──▶ held ──notification──▶ notified
//	                   │                  │                        │
//	                   │ superseded,      │ Release,               │ Release, session lost,
//	                   │ timeout, …       │ session lost           │ preemption timeout
//	                   ▼                  ▼                        ▼
//	                 over               over                     over
//
// # What it guarantees
//
// CONTRACT.md, in the repository, states it in numbered clauses, which this
// documentation refers to (C7). In short: the newest claim wins, whether or not
// messages arrive (C3, C7, C8); a holder is told once, with the cause (C5, C13),
// and the lock is taken from it if it does not stop in time (C14); a holder whose
// session dies learns of it before its successor starts (C11, C24, C25); every
// hold has a fencing token larger than all before it (C15); a Lock that failed
// leaves nothing behind (C20).
//
// # What it does not guarantee
//
// A process that is frozen, or that ignores its notification, may still run while
// its successor does: let the resource check Token. PgBouncer in transaction
// pooling mode and read-only standbys cannot carry a session and are refused
// (C27). A failover to an asynchronous standby may forget the last holds.
//
// # Errors
//
// Match with errors.Is: ErrLockPreempted, ErrClaimOutdated, ErrLockTimeout,
// ErrLockLost, ErrMaxLockDuration, ErrProviderClosed, ErrStopRequested, and the
// errors of the contexts that you pass. Errors never contain a password.
package locker
