// Package locker provides a distributed lock on PostgreSQL for work of which only the newest may
// run. A newer claim supersedes older claims that wait, and notifies the holder to stop.
//
// It is made for CI/CD services. A webhook arrives for every push to a pull request, and each
// starts minutes of work on the same environment. Only one may run at a time, and it should be the
// newest. The replicas of the service share one PostgreSQL and nothing else.
//
//	A locks ──────── runs ── notified ── cleans up ────── releases
//	B        claims ── waits ── superseded by C
//	C                    claims ── waits ──────────────── locks ── runs
//
// [NewPostgresPreemptiveLockerFactory] creates a [PreemptiveLockerFactory] for production. Create
// one for each process. The handler of a webhook then calls [PreemptiveLocker.Do], and reads its
// error with [OutcomeOf]:
//
//	newLocker, err := locker.NewPostgresPreemptiveLockerFactory(os.Getenv("DATABASE_URL"), "", nil)
//	if err != nil {
//		return err
//	}
//
//	err = newLocker("org/repo", 7, "push 1f2e3d4").Do(ctx, func(ctx context.Context) error {
//		return deploy(ctx) // ctx is canceled when a newer push arrives
//	})
//	switch outcome, finished := locker.OutcomeOf(err); outcome {
//	case locker.OutcomeCompleted:
//		return nil
//	case locker.OutcomeSuperseded, locker.OutcomePreempted:
//		// A newer push has taken over. finished reports whether deploy returned nil.
//		report(outcome.String(), finished)
//		return nil
//	default: // failed, timeout, lost, …
//		return err
//	}
//
// [NewFakePreemptiveLockerFactory] creates a factory for unit tests, with locks in memory that
// behave in the same way. It needs no server.
//
// # Concepts
//
//   - A key is the int64 that a lock is about. Each pull request has one.
//   - A claim is a request for a key. The database numbers the claims of a key, and the newest
//     wins. A claim has an event, which is the text that other claims, logs and operators see.
//   - A waiter is a caller inside [PreemptiveLocker.Lock]. A waiter is superseded by a newer claim:
//     its Lock returns an error that matches [ErrLockPreempted].
//   - A holder is a caller whose Lock has succeeded and whose hold has not ended. A holder is
//     notified, once and with a cause, when it must stop. Its lock is revoked if it has not
//     released it when the preemption timeout ([WithPreemptionTimeout], 10 s by default) has
//     passed.
//   - A fencing token is the number of a hold ([PreemptiveLocker.Token]). It is larger than those
//     of all earlier holds of the key, in any process.
//   - A session shows other processes that a provider lives. All holds of a provider belong to its
//     session, and outlive its connections. A session without a connection is suspended. If it
//     cannot reconnect in time, it is lost, and its holds end.
//
// # What the caller must do
//
//   - Keep ctx alive for as long as the hold. The context given to [PreemptiveLocker.Lock] and
//     [PreemptiveLocker.Do] belongs to the hold, like that of BeginTx in database/sql: when it is
//     done, the holder is notified. [PreemptiveLocker.Wait] and [WithLockTimeout] bound the wait
//     alone.
//   - Stop soon after the notification. Do cancels the context of its function, and [context.Cause]
//     returns the cause. Lock returns a channel instead.
//   - Release every lock that Lock has returned. Do releases its lock. A Lock that fails leaves
//     nothing to release.
//   - Use a [PreemptiveLocker] once: create another one for the next claim.
//   - Send the fencing token with every write to a resource that can reject an older one. See
//     Limits below.
//   - Before a process ends, cancel the contexts and wait until every Do has returned, or close the
//     provider. Otherwise a successor waits for the session timeout.
//
// # Guarantees
//
//   - The newest claim wins, whether or not messages arrive.
//   - One holder of a key runs at a time. See Limits below for processes that are frozen.
//   - A holder is notified at most once, with the cause.
//   - A hold outlives its connection. If PostgreSQL restarts or fails over, holders that reconnect
//     in time are not notified.
//   - A holder that cannot reconnect is notified before its successor starts.
//   - Each hold has a larger fencing token than all holds of the key before it.
//   - A Lock that fails leaves nothing behind: no connection, no goroutine and no claim that waits.
//   - Lock recovers after an outage. Until then it waits, within the lock timeout and its context.
//     It fails immediately only for bad input, and at first use of a server that cannot carry a
//     session.
//
// # Locks
//
// A lock is in one of five phases and only moves forward:
//
//	fresh ──Lock──▶ waiting ──granted──▶ held ──notification──▶ notified
//	                   │                  │                        │
//	                   │ superseded,      │ Release,               │ Release, lost,
//	                   │ timeout, …       │ lost                   │ preemption timeout
//	                   ▼                  ▼                        ▼
//	                 ended              ended                    ended
//
// One row for each key names the holder and the newest claim, and the row is authoritative. The
// statement that acquires the key compares claims under the lock of that row. NOTIFY only makes it
// fast: if a notification is lost, the provider finds the claim when it next reads the row.
//
// # Sessions
//
// A session is a row of a table, and one advisory lock on one connection of the provider. The
// provider sends a heartbeat every 0.3 of the session timeout ([WithSessionTimeout], 10 s by
// default), and at least every 3 s.
//
//	connected ──connection lost──▶ suspended ──reconnected──▶ connected
//	                                   │
//	                                   │ no good heartbeat for 0.9 of the session timeout
//	                                   ▼
//	                                  lost
//
// While a session is suspended, its holds continue, no holder is notified because of it, and its
// claims wait. When it has reconnected, it has a new advisory lock, and the provider compares its
// holds with the rows. A hold that its row no longer names is lost. Claims that were missed are
// delivered. When a session is lost, its holders are notified with [ErrLockLost], and their holds
// end. The provider then opens another session.
//
// A process takes a key over only after it has watched the holder's session being dead for the
// holder's session timeout, on its own monotonic clock. By then the holder has been notified, after
// 0.9 of that time. No wall clock takes part. With a longer session timeout a hold survives a
// longer outage, and a successor waits longer after a crash.
//
// # Claims
//
// By default a claim preempts the holder. [PreemptiveLocker.Mode] changes that: with [LetFinish]
// the claim waits until the holder has finished, and with [SkipIfBusy] it is skipped if the key is
// busy. The mode of the newer claim decides.
//
//   - [PreemptiveLocker.Sequence] rejects claims that arrive late or twice.
//   - [PreemptiveLocker.Labels] are in the errors of the claims that lose.
//   - [PreemptiveLocker.Wait] bounds one wait.
//   - [PreemptiveLocker.Shield] runs a step that a notification must not cut in half.
//   - [WithProgress] lets a hold finish now and then, however fast newer claims arrive.
//
// # Errors
//
// [OutcomeOf] returns the worst outcome in the error of a Do. One error can match several
// sentinels: that of a Do whose function did not stop in time matches [ErrLockLost], the cause of
// its notification, and the function's error. Without OutcomeOf, test for the worst sentinel first.
//
// The sentinels match with [errors.Is]: [ErrLockPreempted], [ErrClaimOutdated], [ErrLockTimeout],
// [ErrLockBusy], [ErrLockLost], [ErrMaxLockDuration], [ErrProviderClosed], [ErrStopRequested] and
// [ErrLockNested]. A context that is done matches its own error. With [errors.As] a [ConflictError]
// names the claim that has won, and the holder. Errors never contain a password.
//
// # Limits
//
// A hold is not a physical barrier. A process that is frozen until its key was taken over, or that
// ignores its notification, may run concurrently with its successor. A holder whose session was
// lost may still be cleaning up when its successor starts. Let the resource compare fencing tokens,
// or set [WithLockDelay].
//
// A pool such as PgBouncer in transaction mode, and a read-only standby, cannot carry a session:
// first use returns an error. A failover to an asynchronous standby may forget the last holds.
//
// A key is also busy while another program has its session-level advisory lock.
// [WithOriginalReplicas] provides the reverse, and with it exclusion of replicas of the original
// library.
//
// # Where to go next
//
//   - [WithPostgresBackend] and [WithPostgresURI] describe connection strings, and docs/connect.md
//     in the repository has all their forms.
//   - [LockProviderOption] and [PreemptiveLockerOption] list the options.
//   - [NewPostgresProvider] returns a provider that can be closed. Its methods
//     [PostgresLockProvider.ListLocks], [PostgresLockProvider.RequestStop],
//     [PostgresLockProvider.Ping] and [PostgresLockProvider.Stats] are for operators and probes.
//   - [WithLogger], [WithObserver] and [WithTracer] report what happens, for logs, metrics and
//     spans.
//   - [LockProvider] is the interface for custom providers.
//   - CONTRACT.md states all guarantees in full. The folder docs has guides for webhook handlers,
//     workers, unit tests and operations.
package locker
