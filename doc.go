// Package locker provides a preemptive distributed lock on PostgreSQL. The newest
// claim wins: it supersedes older claims that wait, and notifies the holder to stop.
//
// A CI/CD service receives a webhook for every push to a pull request, and each one
// starts minutes of work on the same environment. Only one may run at a time, and it
// should be the newest. Several replicas of the service share one PostgreSQL and
// nothing else.
//
//	A locks ──────── runs ── notified ── cleans up ────── releases
//	B        claims ── waits ── superseded by C
//	C                    claims ── waits ──────────────── locks ── runs
//
// With a [PreemptiveLockerFactory] a handler contains only this:
//
//	err := newLocker("org/repo", 7, "push 1f2e3d4").Do(ctx, func(ctx context.Context) error {
//		return deploy(ctx) // ctx is canceled when a newer push arrives
//	})
//
// [NewPostgresPreemptiveLockerFactory] creates such a factory for production.
// [NewFakePreemptiveLockerFactory] creates one for unit tests, with the same behavior
// and no server.
//
// # Guarantees
//
//   - One holder at a time runs. See below for processes that are frozen.
//   - The newest claim wins, whether or not messages arrive.
//   - A holder is notified once, with the cause. Its lock is revoked if it does not
//     stop within the preemption timeout.
//   - A hold outlives its connection. If PostgreSQL restarts or fails over, holders
//     that can reconnect in time do not notice.
//   - A holder that cannot reconnect is notified before its successor starts.
//   - Each hold has a fencing token, [PreemptiveLocker.Token], that is larger than those
//     of all holds of the key before it.
//   - A Lock that fails leaves nothing behind.
//   - After an outage Lock works again. Until then it waits, within the lock timeout and
//     its context. It fails immediately only for bad input and at first use of a server
//     that cannot be used.
//
// CONTRACT.md in the repository states them in full.
//
// # Locks
//
// A lock is used once. It is in one of five phases and only moves forward:
//
//	fresh ──Lock──▶ waiting ──granted──▶ held ──notification──▶ notified
//	                   │                  │                        │
//	                   │ superseded,      │ Release,               │ Release, lost,
//	                   │ timeout, …       │ lost                   │ preemption timeout
//	                   ▼                  ▼                        ▼
//	                 over               over                     over
//
// The context given to [PreemptiveLocker.Lock] and [PreemptiveLocker.Do] must live as
// long as the hold, like that of BeginTx in database/sql: when it is done, the holder is
// notified.
//
// One row per key names the holder and the newest claim. The statement that acquires
// the key compares claims under the lock of that row. NOTIFY only makes it fast: a
// notification that is lost is made up for by a look at the row.
//
// # Sessions
//
// All holds of a provider belong to its session. A session is a row of a table, and one
// advisory lock that the provider's connection has. The advisory lock shows other
// processes that this one lives. The provider sends a heartbeat every 0.3 of the session
// timeout ([WithSessionTimeout], 10 seconds by default).
//
//	connected ──connection lost──▶ suspended ──reconnected──▶ connected
//	                                   │
//	                                   │ no good heartbeat for 0.9 of the session timeout
//	                                   ▼
//	                                  lost
//
// While a session is suspended, its holds continue and no holder is notified. Its claims
// wait. When it has reconnected, it has a new advisory lock, and the provider compares its
// holds with the rows. A hold whose row does not name it any longer is lost, and claims
// that were missed are delivered. When a session is lost, its holders are notified with
// [ErrLockLost] and their holds end. The provider then opens another session.
//
// A process takes a key over only after it has watched the holder's session being dead
// for the holder's session timeout, on its own monotonic clock. The holder was notified
// earlier, after 0.9 of it. No wall clock takes part. So a longer session timeout lets a
// hold survive a longer outage, and lets a successor wait longer after a crash.
//
// [WithLogger], [WithObserver] and [PostgresLockProvider.Stats] report sessions that are
// suspended, reconnected and lost. [WithTracer] reports each Lock, each Release and the
// statements that serve them, for spans.
//
// # Claims
//
// A claim has a mode ([PreemptiveLocker.Mode]): it preempts the holder, which is the
// default, or lets it finish, or is skipped if the key is busy. The newer claim's mode
// decides. [PreemptiveLocker.Sequence] turns away what arrives late or twice, and
// [WithProgress] lets a hold finish now and then, however fast newer claims come.
// [PreemptiveLocker.Wait] bounds one wait. [PreemptiveLocker.Labels] come back to the
// claims that lose.
//
// # Limits
//
// A process that is frozen until its key was taken over, or that ignores its
// notification, may run next to its successor. A holder whose session was lost may still
// be cleaning up when its successor starts. Let the resource compare tokens, or see
// [WithLockDelay].
//
// PgBouncer in transaction pooling mode and read-only standbys cannot carry a session:
// first use returns an error. A failover to an asynchronous standby may forget the last
// holds.
//
// A key is also busy while another program has its session-level advisory lock. The
// reverse, and with it exclusion of replicas of the original library, needs
// [WithOriginalReplicas].
//
// # Errors
//
// Read the error of [PreemptiveLocker.Do] with [OutcomeOf]. It returns the worst outcome:
// an error can match several sentinels. That of a Do whose function did not stop in time
// matches [ErrLockLost], the cause of its notification, and the function's error.
//
//	switch outcome, finished := locker.OutcomeOf(err); outcome {
//	case locker.OutcomeCompleted:
//		report("success")
//	case locker.OutcomeSuperseded, locker.OutcomePreempted: // by a newer claim
//		report(outcome.String(), finished)
//	default:
//		report(outcome.String(), err)
//	}
//
// With [errors.As] a [ConflictError] names the claim that won and the holder. The
// sentinels match with [errors.Is]: [ErrLockPreempted], [ErrClaimOutdated],
// [ErrLockTimeout], [ErrLockBusy], [ErrLockLost], [ErrMaxLockDuration],
// [ErrProviderClosed], [ErrStopRequested], [ErrLockNested], and the errors of the contexts
// that you pass. Errors never contain a password.
package locker
