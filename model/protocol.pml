/*
 * The lock protocol: N clients, one key, one claim each. Holds outlive
 * connections.
 *
 * One step of this model is one SQL statement, one message or one event
 * of the outside world. README.md lists what is left out and why.
 *
 * Modes (cpp -D)
 *   N=n            clients, default 3
 *   FAULTS=n       session connections that are lost, default 1
 *   SLIPS=n        statements that are delayed or lose their reply, default 1
 *   QUITS=n        waiters that give up, default 0
 *   CALM           no faults, no waiter gives up, but hints still get lost
 *   STAY           a holder never stops without a notification
 *   JUDGE          when no step is possible any longer, check which clients are left (with STAY)
 *   CRASH          the database server crashes once, at any moment
 *   VIEW           the snapshot of an acquire is older than its effect
 *   STRICT         a holder that knows of its lost session still counts as inside
 *   LONGDELAY      a lock delay that outlasts the drain of a lost holder
 *   MODES          claims also let the holder finish, or skip a busy key
 *   BOUND=n        after n holds in a row that claims have ended, one is spared
 *   NOKEEP         do not check that a hold is kept, and why it is notified
 *   NOINSIDE       do not check which clients go inside
 *   LTL_PREEMPT, LTL_WAITED, LTL_END  the liveness formulas
 * Mutants: each removes one rule, and must be caught
 *   KEEPLOCK       a reconnect keeps the lock number, or the watch is per session
 *   ROWALONE       take-over of any holder: no liveness, no watch
 *   NOWATCH        take-over of a lock that is dead now, however short
 *   NOCOMPARE      a watched lock is not compared with the session's row
 *   LISTAFTER      the list of watched locks is younger than the snapshot (with VIEW)
 *   MISSING        a session without a row is dead, without a watch (with VIEW)
 *   LATEUPDATE     an old connection's update may overwrite a newer one
 *   NOTRUST        a holder is not notified when its trust expires
 *   GRANTLOST      a grant is accepted although the session is lost
 *   ACQANY         a repeated acquire does not compare the session
 *   ACQSAME        a repeated acquire is granted only a grant of its own session,
 *                  and not one of an earlier session (with MODES)
 *   RELANY         a release compares the claim, but not the session
 *   CLEARANY       a late release clears whatever holder the row names
 *   NOCHECK        acquire does not compare claims
 *   STALEHINT      a hint is obeyed without comparing claims
 *   STALEAGE       a delayed announcement counts from its arrival
 *   NOBEAT         no check of rows, only hints
 *   NOPOLL         a waiter tries again only after a hint
 *   NOFOLLOW       an abandoned acquire is not followed by a release
 *   RELONCE        a release is final although an acquire is still in flight
 *   NORECONCILE    a reconnect does not look for forgotten releases (with CRASH)
 *   NOREPEAT       a forgotten announcement is not repeated (with CRASH)
 *   ASYNCGRANT     acquire does not wait for the disk (with CRASH)
 *   ASYNCLOCK      the update of the session's row does not (with CRASH)
 *   ASYNCROW       the insert of the session's row does not (with CRASH)
 *   STOPKEPT       the stop mark is not reset when a hold ends
 *   FINISHSTOPS    a claim that lets finish sets the stop mark (with MODES)
 *   FINISHHINT     a holder obeys the hint of such a claim (with MODES)
 *   SKIPBUSY       a claim that skips ignores a claim that waits (with MODES)
 *   READOPT        a claim that skips counts as the newest claim of its last reply,
 *                  and the check of its row compares that (with MODES)
 *   STREAKKEPT     a hold that no claim has ended does not end the streak (with BOUND)
 *   STREAKLOST     a take-over ends the streak (with BOUND)
 *   SPAREDTOLD     a spared hold is notified of a claim (with BOUND)
 *   SPAREDFIRST    the spared time ends earlier for the client than in the row (with BOUND)
 */

#ifndef N
#define N 3
#endif
#ifdef CALM
#undef FAULTS
#undef QUITS
#define FAULTS 0
#define QUITS 0
#endif
#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef SLIPS
#define SLIPS 1
#endif
#ifndef QUITS
#define QUITS 0
#endif
#define G 2 /* sessions of a client, one after the other */

/* phases of a client */
#define INIT       0
#define WAIT       1
#define TRY        2  /* an acquire has taken its snapshot (VIEW) */
#define SENT       3  /* granted, the reply is in flight */
#define DELAY      4  /* granted, waits for the lock delay (LONGDELAY) */
#define HOLD       5  /* inside, not notified */
#define DRAIN      6  /* inside, notified */
#define LOST       7  /* inside, notified that the session is lost */
#define RELEASING  8  /* outside; the release is not yet known to have happened */
#define END        9

/* the row of the key */
byte row_claim;      /* newest claim */
byte row_holder;     /* session + 1, 0: none */
byte row_token;      /* last token */
bit  row_stop;       /* a claim that preempts was announced during the hold */
#ifdef MODES
#define PREEMPT 0
#define FINISH  1  /* lets the holder finish */
#define SKIP    2  /* takes a key that is free, or ends */
byte mode[N];
bit  soft[N + 1];    /* by the number of a claim: it lets the holder finish */
byte row_open;       /* client of the newest claim, if that has not ended, + 1 */
#endif
#ifdef BOUND
byte row_streak;     /* holds in a row that claims have ended; BOUND also means more */
byte row_spared;     /* of the hold: no, its time runs (RUNS), its time has passed (OVERDUE) */
#define RUNS 1
#define OVERDUE 2
bit  spared[N];      /* no claim notifies the holder */
#endif

/* the rows of the sessions: number of the current lock, 0: no row */
byte lock[N * G];

/* the connections, counted per client; a lock has its connection's number */
byte top[N];         /* last one that was opened */
byte alive[N];       /* set of those that the server has not ended */
byte anchor[N];      /* that of the last good heartbeat; 0: the session is lost */
bit  cut[N];         /* no heartbeat gets through */

byte gen[N];         /* current session */
byte phase[N];
byte claim[N];
bit  pending[N];     /* an acquire had no reply and may have been granted */
byte hint[N];        /* claim in a NOTIFY in flight, 0: none */

/* statements that the client has given up on, but the server has not */
byte late_lock[N];   /* connection whose update has to enter its lock */
byte late_take[N];   /* acquire for this session + 1 */
byte late_clear[N];  /* release of this session's hold + 1 */
bit  late_ask[N];    /* announcement */

byte asks;           /* the claims, in the order in which callers asked */
byte entered;        /* token of the last client that went inside */
byte faults = FAULTS, slips = SLIPS, quits = QUITS;
bit  over;

#ifdef VIEW
byte seen[N];        /* set of sessions that the snapshot lets i take over from */
#endif
#ifdef NOPOLL
bit asleep[N];
#endif

/* Verdicts. They stay 0 unless a property is broken. */
bit two_inside, hold_lost, older_granted, token_not_rising, not_just_the_newest;
bit notified_for_none, waiter_passed, starved, spared_for_none, busy_with_itself;

/* Ghost variables: the properties refer to them, whatever the rules are. */
bit wanted;          /* a claim that preempts was announced during the hold */
#ifdef BOUND
bit  told;           /* a claim has notified the hold */
byte in_a_row;       /* holds in a row that claims have notified, none of them after its spared time */
byte ended;          /* holds in a row that were wanted while they were not spared */
#endif

#ifdef CRASH
byte disk_claim, disk_token, disk_holder, disk_lock[N * G];
bit  disk_stop;
#ifdef MODES
byte disk_open;
#endif
byte last_token;     /* a ghost that a crash cannot turn back */
bit  settled;        /* the crash has happened, or there will be none */
#define SETTLED settled
#else
#define SETTLED true
#endif

#define NAME(i) (64 + N - i)        /* A, B, C */
#define SESSION(i, g) ((i) * G + (g))
#define MINE(i) (row_holder == SESSION(i, gen[i]) + 1)
#define OURS(i) (row_holder != 0 && (row_holder - 1) / G == i)
#define ALIVE(i, c) ((alive[i] >> (c)) & 1)

/* ---- the rules ---- */

/*
 * Time. A watch of lock c ends only after its client has had a good
 * heartbeat on a later connection, or knows that its session is lost.
 * See README.md.
 */
#define WATCHED(i, c) (!ALIVE(i, c) && (anchor[i] == 0 || anchor[i] > (c)))

/*
 * A hold of session s may be taken over: the lock in the session's row was
 * watched and is dead. A row that is missing was watched, too, but by
 * the clock of another timeout: no rule about time is assumed.
 */
#define OWNER(s) ((s) / G)
#ifdef MISSING
#define NOROW(s) (lock[s] == 0)
#else
#define NOROW(s) (lock[s] == 0 && row_holder == (s) + 1)
#endif
#define FIRST(s) ((s) % G == 0 && lock[s] > 1 && WATCHED(OWNER(s), 1))
#if defined(ROWALONE)
#define TAKEABLE(s) true
#elif defined(NOWATCH)
#define TAKEABLE(s) (NOROW(s) || lock[s] != 0 && !ALIVE(OWNER(s), lock[s]))
#elif defined(KEEPLOCK)
#define TAKEABLE(s) (NOROW(s) || lock[s] != 0 && !ALIVE(OWNER(s), lock[s]) && (WATCHED(OWNER(s), lock[s]) || FIRST(s)))
#elif defined(NOCOMPARE)
#define TAKEABLE(s) (NOROW(s) || lock[s] != 0 && (WATCHED(OWNER(s), lock[s]) || FIRST(s)))
#else
#define TAKEABLE(s) (NOROW(s) || lock[s] != 0 && WATCHED(OWNER(s), lock[s]))
#endif

/*
 * The row's hold is a grant of this claim, to session g or an earlier one, of
 * which the client has no reply.
 */
#if defined(ACQANY)
#define VERY(i, g) OURS(i)
#elif defined(ACQSAME)
#define VERY(i, g) (row_holder == SESSION(i, g) + 1)
#else
#define VERY(i, g) (OURS(i) && (row_holder - 1) % G <= g)
#endif

#ifdef MODES
#define SKIPS(i) (mode[i] == SKIP)
#else
#define SKIPS(i) false
#endif

#ifdef NOCHECK
#define VALID(i) true
#else
#define VALID(i) (SKIPS(i) || row_claim <= claim[i])
#endif

/*
 * A claim that skips takes no key for which the newest claim waits, if the
 * session of that claim lives.
 */
#define LIVES(k) (lock[SESSION(k, gen[k])] != 0 && ALIVE(k, lock[SESSION(k, gen[k])]))
#if defined(MODES) && !defined(SKIPBUSY)
#define PASSES(i, g) (SKIPS(i) && row_open != 0 && !VERY(i, g) && LIVES(row_open - 1))
#else
#define PASSES(i, g) false
#endif
#define FREE(i, g) ((row_holder == 0 || VERY(i, g) || TAKEABLE(row_holder - 1)) && !(PASSES(i, g)))

/* A claim asks the holder to stop, unless it lets it finish. */
#ifdef MODES
#define PREEMPTS(i) (mode[i] == PREEMPT)
#else
#define PREEMPTS(i) true
#endif
#ifdef FINISHSTOPS
#define MARKS(i) true
#else
#define MARKS(i) PREEMPTS(i)
#endif
#if defined(MODES) && !defined(FINISHHINT)
#define ASKS(c) (!soft[c])
#else
#define ASKS(c) true
#endif

#if defined(BOUND) && !defined(SPAREDTOLD)
#define SPARED(i) spared[i]
#else
#define SPARED(i) false
#endif

#ifdef GRANTLOST
#define TRUSTED(i) true
#else
#define TRUSTED(i) (anchor[i] != 0)
#endif

#ifdef LATEUPDATE
#define YOUNGER(i, c) true
#else
#define YOUNGER(i, c) ((c) > lock[SESSION(i, gen[i])])
#endif

#if defined(CLEARANY)
#define CLEARS(i, g) true
#elif defined(RELANY)
#define CLEARS(i, g) OURS(i)
#else
#define CLEARS(i, g) (row_holder == SESSION(i, g) + 1)
#endif

#ifdef NOFOLLOW
#define FOLLOW(i) false
#else
#define FOLLOW(i) pending[i]
#endif

#ifdef RELONCE
#define FINAL(i) true
#else
#define FINAL(i) (late_take[i] == 0)
#endif

#ifdef STALEHINT
#define HINTED(i) (hint[i] != 0 && hint[i] != claim[i])
#else
#define HINTED(i) (hint[i] > claim[i])
#endif

/* The check of a row trusts the stop mark, and compares no claims. */
#ifdef READOPT
#define NEWER(i) (row_claim > claim[i])
#else
#define NEWER(i) true
#endif

#ifdef NOBEAT
#define BEAT(i) false
#else
#define BEAT(i) (!cut[i] && MINE(i) && row_stop && NEWER(i))
#endif

#ifdef NOPOLL
#define AWAKE(i) (!asleep[i])
#else
#define AWAKE(i) true
#endif

#ifdef STRICT
#define INSIDE(k) (phase[k] == HOLD || phase[k] == DRAIN || phase[k] == LOST)
#else
#define INSIDE(k) (phase[k] == HOLD || phase[k] == DRAIN)
#endif

/* ---- the steps of the server ---- */

#ifdef CRASH
inline flush()
{
	disk_claim = row_claim; disk_token = row_token; disk_holder = row_holder;
	disk_stop = row_stop;
#ifdef MODES
	disk_open = row_open;
#endif
	f = 0;
	do
	:: f < N * G -> disk_lock[f] = lock[f]; f++
	:: f == N * G -> break
	od;
	f = 0
}
#endif

inline wake()
{
#ifdef NOPOLL
	k = 0;
	do
	:: k < N -> asleep[k] = 0; k++
	:: k == N -> break
	od;
	k = 0
#else
	skip
#endif
}

/* The row's hold ends, by a release or a take-over. */
inline end_hold()
{
#ifdef BOUND
	if
	:: row_stop && row_spared != RUNS && row_streak < BOUND -> row_streak++
	:: row_stop && row_spared != RUNS && row_streak >= BOUND
#ifdef STREAKKEPT
	:: else
#else
	:: else -> row_streak = 0
#endif
	fi;
	ended = (wanted && row_spared != RUNS -> (ended < BOUND -> ended + 1 : BOUND) : 0);
	row_spared = 0;
#endif
#ifndef STOPKEPT
	row_stop = 0;
#endif
	wanted = 0
}

inline release(i)
{
	end_hold();
	row_holder = 0;
#ifdef MODES
	if
	:: row_open == i + 1 -> row_open = 0
	:: else
	fi;
#endif
	wake()
}

/* Every other client is sent a hint. Each copy may get lost. */
inline announce(i)
{
	row_claim = claim[i];
	if
	:: row_holder != 0 && !OURS(i) && MARKS(i) -> row_stop = 1
	:: else
	fi;
	if
	:: row_holder != 0 && !OURS(i) && PREEMPTS(i) -> wanted = 1
	:: else
	fi;
#ifdef MODES
	row_open = i + 1;
	if
	:: mode[i] == FINISH -> printf("%c announces claim %d, which lets the holder finish\n", NAME(i), claim[i])
	:: else -> printf("%c announces claim %d\n", NAME(i), claim[i])
	fi;
#else
	printf("%c announces claim %d\n", NAME(i), claim[i]);
#endif
#ifndef STALEHINT
	hint[i] = 0; /* every hint in flight to this client is older */
#endif
	k = 0;
	do
	:: k < N && k != i && phase[k] < DRAIN -> hint[k] = row_claim; k++
	:: k < N -> k++
	:: k == N -> break
	od;
	k = 0
}

/* The key is free for session g of client i, and no claim is newer. */
inline acquire(i, g)
{
	d_step {
		if
		:: VERY(i, g) -> printf("%c is granted the key again\n", NAME(i))
		:: else ->
			row_token++;
			if
			:: row_holder == 0 -> printf("%c is granted token %d\n", NAME(i), row_token)
			:: else -> printf("%c takes over from %c with token %d\n", NAME(i), NAME((row_holder - 1) / G), row_token)
			fi;
			older_granted = (!SKIPS(i) && claim[i] < row_claim);
			assert(!older_granted);
			claim[i] = (SKIPS(i) -> row_claim : claim[i]);
			if
			:: row_holder != 0 -> end_hold()
#ifdef STREAKLOST
				; row_streak = 0
#endif
			:: else
			fi;
#ifdef MODES
			if
			:: SKIPS(i) && row_open != 0 && row_open != i + 1 ->
				k = row_open - 1;
				waiter_passed = (phase[k] == WAIT && claim[k] == row_claim && !cut[k] && anchor[k] != 0 && !pending[k]);
				k = 0;
				assert(!waiter_passed)
			:: else
			fi;
#endif
#ifdef BOUND
			row_spared = (row_streak >= BOUND -> RUNS : 0);
			spared_for_none = (row_spared && ended < BOUND);
			assert(!spared_for_none);
			in_a_row = (told -> in_a_row : 0);
			told = 0;
#endif
#ifdef CRASH
			token_not_rising = (row_token <= last_token);
			assert(!token_not_rising);
			last_token = row_token
#endif
		fi;
		row_holder = SESSION(i, g) + 1;
#ifdef READOPT
		claim[i] = (SKIPS(i) -> row_claim : claim[i]);
#endif
		if
		:: !SKIPS(i) && claim[i] > row_claim -> row_claim = claim[i]
		:: else
		fi;
#if defined(CRASH) && !defined(ASYNCGRANT)
		flush()
#endif
	}
}

/* ---- the steps of the client ---- */

inline finish(i)
{
	d_step {
		phase[i] = END;
		hint[i] = 0; pending[i] = 0;
#ifdef BOUND
		spared[i] = 0;
#endif
#ifndef CRASH
		cut[i] = 0;
		if
		:: !OURS(i) && late_take[i] == 0 -> alive[i] = 0; anchor[i] = 0; late_lock[i] = 0
		:: else
		fi
#endif
	}
}

/* Lock fails. A claim that does not wait any longer is withdrawn. */
inline give_up(i)
{
#ifdef MODES
	if
	:: row_open == i + 1 && !OURS(i) -> row_open = 0
	:: else
	fi;
#endif
	if
	:: FOLLOW(i) -> phase[i] = RELEASING; hint[i] = 0
	:: else -> finish(i)
	fi
}

inline enter(i)
{
	d_step {
		printf("%c goes inside\n", NAME(i));
#ifndef NOINSIDE
		k = 0;
		do
		:: k < N ->
			if
			:: k != i && INSIDE(k) -> two_inside = 1
			:: else
			fi;
			k++
		:: k == N -> break
		od;
		k = 0;
		assert(!two_inside);
		token_not_rising = (row_token <= entered);
		assert(!token_not_rising);
#endif
		entered = row_token;
#ifdef BOUND
		spared[i] = (row_spared != 0);
#endif
		phase[i] = HOLD
	}
}

/* A claim notifies the holder. */
inline notify(i)
{
	hint[i] = 0;
#if !defined(NOKEEP) && !defined(NOINSIDE)
	notified_for_none = !wanted;
	assert(!notified_for_none);
#endif
#ifdef BOUND
	in_a_row = (row_spared == OVERDUE && !spared[i] -> 0 : in_a_row + 1);
	told = 1;
	starved = (in_a_row > BOUND);
	assert(!starved);
	spared[i] = 0;
#endif
	phase[i] = DRAIN
}

/* The row of a new connection's session has its lock, and the client knows. */
inline connected(i, c)
{
	anchor[i] = c;
	cut[i] = 0;
	alive[i] = 1 << c;
	if
	:: late_lock[i] != 0 -> alive[i] = alive[i] | (1 << late_lock[i])
	:: else
	fi
}

inline enter_lock(i, c)
{
	lock[SESSION(i, gen[i])] = c;
#if defined(CRASH) && !defined(ASYNCLOCK)
	flush()
#endif
}

proctype Client(byte i)
{
	byte k;
#ifdef CRASH
	byte f;
#endif
	do

	/* The caller asks. */
	:: atomic { phase[i] == INIT ->
#ifdef MODES
		if
		:: mode[i] = PREEMPT
		:: mode[i] = FINISH
		:: mode[i] = SKIP; phase[i] = WAIT; printf("%c asks for the key if it is free\n", NAME(i)); goto asked
		fi;
#endif
		asks++;
		claim[i] = asks;
#ifdef MODES
		soft[asks] = (mode[i] == FINISH);
#endif
		phase[i] = WAIT;
		if
		:: announce(i)
		:: slips > 0 -> slips--; late_ask[i] = 1; printf("%c's announcement of claim %d is delayed\n", NAME(i), claim[i])
		fi;
asked:		skip }
#ifdef MODES
	:: atomic { phase[i] == WAIT && SKIPS(i) && anchor[i] != 0 &&
			(row_holder != 0 && !(VERY(i, gen[i])) || PASSES(i, gen[i])) ->
		printf("%c is told that the key is busy\n", NAME(i));
		busy_with_itself = OURS(i);
		assert(!busy_with_itself);
		give_up(i) }
#endif

	/*
	 * Wait. An attempt that finds the key busy changes nothing, so it is
	 * not a step: a poll is the attempt that finds something to do.
	 */
	:: atomic { phase[i] == WAIT && AWAKE(i) && row_claim > claim[i] && !(VALID(i)) ->
		printf("%c is refused: a newer claim exists\n", NAME(i)); give_up(i) }
	:: atomic { phase[i] == WAIT && HINTED(i) && !SKIPS(i) ->
		printf("%c hears of a newer claim while waiting\n", NAME(i)); give_up(i) }
#ifndef NOREPEAT
	:: atomic { phase[i] == WAIT && row_claim < claim[i] && !SKIPS(i) -> announce(i) }
#endif
#ifdef VIEW
	:: atomic { phase[i] == WAIT && anchor[i] != 0 && VALID(i) ->
		k = 0;
		do
#ifdef LISTAFTER
		:: k < N * G && !ALIVE(OWNER(k), lock[k]) -> seen[i] = seen[i] | (1 << k); k++
		:: k < N * G && ALIVE(OWNER(k), lock[k]) -> k++
#else
		:: k < N * G && TAKEABLE(k) -> seen[i] = seen[i] | (1 << k); k++
		:: k < N * G && !(TAKEABLE(k)) -> k++
#endif
		:: k == N * G -> break
		od;
		k = 0;
		phase[i] = TRY }
	:: atomic { phase[i] == TRY ->
		if
		:: VALID(i) && (row_holder == 0 || VERY(i, gen[i])) -> acquire(i, gen[i]); phase[i] = SENT
#ifdef LISTAFTER
		:: VALID(i) && row_holder != 0 && !(VERY(i, gen[i])) && ((seen[i] >> (row_holder - 1)) & 1) &&
			(TAKEABLE(row_holder - 1) || FIRST(row_holder - 1)) -> acquire(i, gen[i]); phase[i] = SENT
#else
		:: VALID(i) && row_holder != 0 && !(VERY(i, gen[i])) && ((seen[i] >> (row_holder - 1)) & 1) ->
			acquire(i, gen[i]); phase[i] = SENT
#endif
		:: else -> phase[i] = WAIT
		fi;
		seen[i] = 0 }
#else
	:: atomic { phase[i] == WAIT && AWAKE(i) && anchor[i] != 0 && VALID(i) && FREE(i, gen[i]) ->
		acquire(i, gen[i]);
		phase[i] = SENT }
#endif
	:: atomic { phase[i] == WAIT && anchor[i] != 0 && VALID(i) && slips > 0 && late_take[i] == 0 ->
		printf("%c's acquire is delayed\n", NAME(i));
		slips--;
		late_take[i] = gen[i] + 1;
		pending[i] = 1 }
#ifdef NOPOLL
	:: atomic { phase[i] == WAIT && AWAKE(i) && VALID(i) && !(FREE(i, gen[i])) -> asleep[i] = 1 }
#endif

	/* Granted. A reply that comes after the session was lost is not accepted. */
	:: atomic { phase[i] == SENT ->
		if
		:: TRUSTED(i) ->
			pending[i] = 0;
#ifdef LONGDELAY
			phase[i] = DELAY
#else
			enter(i)
#endif
		:: !(TRUSTED(i)) -> printf("%c is granted the key too late\n", NAME(i)); pending[i] = 1; phase[i] = WAIT
		:: slips > 0 -> printf("%c's grant is lost\n", NAME(i)); slips--; pending[i] = 1; phase[i] = WAIT
		fi }
#ifdef LONGDELAY
	:: atomic { phase[i] == DELAY && anchor[i] != 0 ->
		k = 0;
		do
		:: k < N && phase[k] != LOST -> k++
		:: k == N -> break
		od;
		enter(i) }
	:: atomic { phase[i] == DELAY && (HINTED(i) && ASKS(hint[i]) || BEAT(i) || anchor[i] == 0) ->
		printf("%c leaves during its lock delay\n", NAME(i)); hint[i] = 0; phase[i] = RELEASING }
#endif

	/* Inside. */
#ifdef STAY
	:: atomic { phase[i] == HOLD && over -> phase[i] = RELEASING }
#else
	:: atomic { phase[i] == HOLD -> printf("%c is done\n", NAME(i)); hint[i] = 0; phase[i] = RELEASING }
#endif
	:: atomic { phase[i] == HOLD && HINTED(i) && ASKS(hint[i]) && !SPARED(i) ->
		printf("%c is notified by a hint\n", NAME(i)); notify(i) }
	:: atomic { phase[i] == HOLD && BEAT(i) && !SPARED(i) ->
		printf("%c is notified by the check of its row\n", NAME(i)); notify(i) }
#ifdef BOUND
	/* The client begins to count its spared time later than the row, so that time ends later, too. */
#ifdef SPAREDFIRST
	:: d_step { phase[i] == HOLD && spared[i] ->
#else
	:: d_step { phase[i] == HOLD && spared[i] && row_spared != RUNS ->
#endif
		spared[i] = 0; printf("%c is not spared any longer\n", NAME(i)) }
	:: d_step { row_spared == RUNS && OURS(i) ->
		row_spared = OVERDUE; printf("%c's row does not spare it any longer\n", NAME(i)) }
#endif
#ifndef NOKEEP
	:: d_step { (phase[i] == HOLD || phase[i] == DRAIN) && !cut[i] && !MINE(i) ->
		printf("%c is connected, but its row does not name it\n", NAME(i));
		hold_lost = 1;
		assert(!hold_lost) }
#endif

	/* Draining always ends: the holder stops, or it is revoked. */
	:: atomic { phase[i] == DRAIN -> printf("%c stops\n", NAME(i)); phase[i] = RELEASING }
	:: atomic { phase[i] == LOST -> printf("%c stops\n", NAME(i)); phase[i] = RELEASING }

	/* The release is repeated until it is known to have happened. Without a session it may fail forever. */
	:: atomic { phase[i] == RELEASING && (OURS(i) || FINAL(i)) ->
		if
		:: OURS(i) -> release(i); printf("%c releases\n", NAME(i))
		:: !OURS(i)
		:: slips > 0 && late_clear[i] == 0 ->
			printf("%c's release is delayed\n", NAME(i)); slips--; late_clear[i] = gen[i] + 1; goto again
		fi;
		if
		:: FINAL(i) -> finish(i)
		:: !(FINAL(i)) /* an acquire is in flight: once more */
		:: slips > 0 && FINAL(i) -> slips-- /* the reply is lost: once more */
		fi;
again:		skip }
	:: atomic { phase[i] == RELEASING && anchor[i] == 0 ->
		printf("%c ends without a release\n", NAME(i)); finish(i) }

	/* The session is suspended: it reconnects, or is lost. */
	:: atomic { cut[i] && anchor[i] != 0 && top[i] < 7 ->
		top[i]++;
		if
		:: enter_lock(i, top[i]);
			connected(i, top[i]);
			printf("%c reconnects with lock %d\n", NAME(i), top[i]);
#ifdef CRASH
#ifndef NORECONCILE
			if
			:: phase[i] == END && OURS(i) -> release(i); printf("%c finds a forgotten release\n", NAME(i))
			:: else
			fi
#endif
#endif
		:: faults > 0 ->
			faults--;
			alive[i] = alive[i] | (1 << top[i]);
			enter_lock(i, top[i]);
			printf("%c reconnects with lock %d and gets no reply\n", NAME(i), top[i])
		:: faults > 0 && late_lock[i] == 0 ->
			faults--;
			alive[i] = alive[i] | (1 << top[i]);
			late_lock[i] = top[i];
			printf("%c reconnects, its update of lock %d is delayed\n", NAME(i), top[i])
		fi }
	:: atomic { cut[i] && anchor[i] != 0 ->
		anchor[i] = 0;
		late_lock[i] = 0;
#ifndef NOTRUST
		if
		:: phase[i] == HOLD || phase[i] == DRAIN ->
			phase[i] = LOST; hint[i] = 0
#ifdef BOUND
			; spared[i] = 0
#endif
		:: else
		fi;
#endif
		printf("%c learns that its session is lost\n", NAME(i)) }

	/* A waiter continues with a new session, or fails. */
	:: atomic { phase[i] == WAIT && anchor[i] == 0 && gen[i] < G - 1 ->
		gen[i]++;
		top[i]++;
		lock[SESSION(i, gen[i])] = top[i];
#if defined(CRASH) && !defined(ASYNCROW)
		flush();
#endif
		anchor[i] = top[i];
		alive[i] = alive[i] | (1 << top[i]);
		cut[i] = 0;
		printf("%c goes on waiting with a new session and lock %d\n", NAME(i), top[i]) }
	:: atomic { phase[i] == WAIT && anchor[i] == 0 ->
		printf("%c's Lock fails without a session\n", NAME(i)); give_up(i) }

	/* It may release the key that was granted to an acquire of its old session. */
	:: atomic { phase[i] == WAIT && pending[i] && anchor[i] != 0 && OURS(i) && !MINE(i) ->
		release(i);
		printf("%c releases the grant of its old session\n", NAME(i)) }
	:: atomic { phase[i] == WAIT && pending[i] && anchor[i] != 0 && OURS(i) && !MINE(i) && slips > 0 && late_clear[i] == 0 ->
		slips--;
		late_clear[i] = gen[i]; /* the session before, + 1 */
		printf("%c's release of the grant of its old session is delayed\n", NAME(i)) }

	:: phase[i] == END && SETTLED && !(cut[i] && anchor[i] != 0) -> break
	od
}

/*
 * The events that come from outside of a client, at any moment: a waiter gives
 * up, no heartbeat gets through, the server ends a connection, a statement that
 * the client has given up on takes effect later, or never.
 */
proctype World(byte i)
{
	byte k, c;
#ifdef CRASH
	byte f;
#endif
end:	do
	:: atomic { quits > 0 && (phase[i] == WAIT || phase[i] == SENT) ->
		quits--;
		printf("%c gives up waiting\n", NAME(i));
		if
		:: phase[i] == SENT -> pending[i] = 1
		:: else
		fi;
		give_up(i) }
	:: d_step { quits > 0 -> quits = 0 }
	:: d_step { faults > 0 && phase[i] < END && anchor[i] != 0 && !cut[i] ->
		faults--;
		cut[i] = 1;
		printf("%c's session is suspended\n", NAME(i)) }
	:: d_step { faults > 0 -> faults = 0 }
	:: d_step { (alive[i] & ~(cut[i] -> 0 : 1 << anchor[i])) != 0 ->
		c = 1;
		do
		:: c < 8 && ALIVE(i, c) && (cut[i] || c != anchor[i]) -> break
		:: else -> c++
		od;
		alive[i] = alive[i] & ~(1 << c);
		if
		:: late_lock[i] == c -> late_lock[i] = 0
		:: else
		fi;
		printf("the server ends %c's connection with lock %d\n", NAME(i), c);
		c = 0 }
	:: atomic { late_lock[i] != 0 ->
		if
		:: YOUNGER(i, late_lock[i]) -> enter_lock(i, late_lock[i]); printf("%c's delayed update enters lock %d\n", NAME(i), late_lock[i])
		:: else
		fi;
		late_lock[i] = 0 }
	:: atomic { late_take[i] != 0 ->
		if
		:: VALID(i) && FREE(i, late_take[i] - 1) ->
			printf("%c's delayed acquire takes effect\n", NAME(i));
			acquire(i, late_take[i] - 1)
		:: true
		fi;
		late_take[i] = 0 }
	:: atomic { late_clear[i] != 0 ->
		if
		:: CLEARS(i, late_clear[i] - 1) -> release(i); printf("%c's delayed release takes effect\n", NAME(i))
		:: true
		fi;
		late_clear[i] = 0 }
	:: atomic { late_ask[i] ->
		if
#ifdef STALEAGE
		:: asks++; claim[i] = asks; announce(i)
#else
		:: row_claim < claim[i] -> announce(i)
#endif
		:: true
		fi;
		late_ask[i] = 0 }
	od
}

#ifdef CRASH
proctype Server()
{
	byte k, f;
	do
	:: d_step { row_claim != disk_claim || row_token != disk_token || row_holder != disk_holder || row_stop != disk_stop -> flush() }
	:: break
	:: d_step {
		row_claim = disk_claim; row_token = disk_token; row_holder = disk_holder;
		row_stop = disk_stop;
#ifdef MODES
		row_open = disk_open;
#endif
		k = 0;
		do
		:: k < N * G -> lock[k] = disk_lock[k]; k++
		:: k == N * G -> break
		od;
		k = 0;
		do
		:: k < N ->
			alive[k] = 0; hint[k] = 0;
			late_lock[k] = 0; late_take[k] = 0; late_clear[k] = 0; late_ask[k] = 0;
			if
			:: anchor[k] != 0 -> cut[k] = 1
			:: else
			fi;
			if
			:: phase[k] == SENT -> phase[k] = WAIT; pending[k] = 1
			:: else
			fi;
			k++
		:: k == N -> break
		od;
		k = 0;
		printf("the server crashes; newest claim on disk %d, token %d\n", row_claim, row_token)
		};
		break
	od;
	settled = 1
}
#endif

#ifdef JUDGE
proctype Judge()
{
	byte k, holders;
	timeout;
	d_step {
		do
		:: k < N ->
			if
			:: phase[k] == HOLD && claim[k] == row_claim -> holders++
			:: phase[k] == END
			:: else ->
				not_just_the_newest = 1;
				printf("at rest: %c is in phase %d with claim %d, newest is %d\n",
					NAME(k), phase[k], claim[k], row_claim)
			fi;
			k++
		:: k == N -> break
		od;
		if
		:: holders != 1 -> not_just_the_newest = 1; printf("at rest: %d holders\n", holders)
		:: else
		fi;
		assert(!not_just_the_newest);
		k = 0; holders = 0;
		over = 1
	}
}
#endif

init
{
	byte n;
	atomic {
		do
		:: n < N ->
			top[n] = 1; alive[n] = 2; anchor[n] = 1;
			lock[SESSION(n, 0)] = 1;
#ifdef CRASH
			disk_lock[SESSION(n, 0)] = 1;
#endif
			run Client(n);
			run World(n);
			n++
		:: n == N -> break
		od;
		n = 0;
#ifdef CRASH
		run Server();
#endif
#ifdef JUDGE
		run Judge();
#endif
	}
}

/* All clients are alike, so a property of the first is a property of all. */
#ifdef LTL_PREEMPT
ltl preempt { [] ((phase[0] == HOLD && OURS(0) && wanted) -> <> (phase[0] != HOLD)) }
#endif
#ifdef LTL_WAITED
ltl waited { [] ((phase[0] == HOLD && phase[1] == WAIT && claim[1] > claim[0]) -> <> (phase[0] != HOLD || phase[1] != WAIT)) }
#endif
#ifdef LTL_END
ltl ends { [] (phase[0] == WAIT -> <> (phase[0] == END)) }
#endif
