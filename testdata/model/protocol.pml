/*
 * The lock protocol: N clients, one key, one claim each.
 *
 * One step of this model is one SQL statement, one message or one event
 * of the outside world. README.md says what is left out and why.
 *
 * Modes (cpp -D)
 *   N=n            clients, default 3
 *   CALM           no lost session, nobody gives up; hints still get lost
 *   STAY           a holder never stops by itself
 *   JUDGE          when nothing moves any more, look who is left (with STAY)
 *   CRASH          the database server crashes once, at any moment
 *   RECONNECT      a waiter that lost its session may go on with a new one
 *   STRICT         a holder that knows of its lost session still counts as inside
 *   LONGDELAY      the lock delay also outlasts the drain of a lost holder
 *   LTL_PREEMPT, LTL_END  the two liveness formulas
 * Mutants: each takes one rule away, and must be caught
 *   NODELAY        no lock delay
 *   FORGET         a release during the lock delay clears the holder
 *   CLEARANY       a late release clears whatever holder the row names
 *   NOCHECK        acquire does not compare claims
 *   STALEHINT      a hint is obeyed without comparing claims
 *   NOBEAT         no heartbeat, only hints
 *   NOPOLL         a waiter tries again only when hinted
 *   ASYNCGRANT     acquire does not wait for the disk (with CRASH)
 */

#ifndef N
#define N 3
#endif

/* phases of a client; END and above are final */
#define INIT       0
#define WAIT       1
#define DELAY      2  /* granted, sits out the lock delay */
#define HOLD       3  /* inside, undisturbed as far as it knows */
#define DRAIN      4  /* inside, told to stop */
#define END        5
#define RELEASED   5
#define PREEMPTED  6  /* was told, then released or revoked */
#define SUPERSEDED 7  /* a newer claim came while it waited */
#define TIMEDOUT   8
#define LOST       9

/* the row in the database */
byte row_claim;   /* newest claim */
byte row_token;   /* last token */
byte row_holder;  /* client + 1, 0: none; still set at a grant: unclean */

byte adv;         /* advisory lock: owner + 1, 0: free */

byte phase[N];
byte claim[N];
byte token[N];
bit  unclean[N];  /* my grant found an unclean row */
byte waitfor[N];  /* set of clients: dead at my grant, not yet told */
byte hint[N];     /* claim number in a NOTIFY under way, 0: none */
bit  cut[N];      /* the client no longer gets answers from its session */
bit  dead[N];     /* the server has ended the session */
bit  lost[N];     /* the client knows that its session is lost */
bit  giveup[N];   /* lock timeout or done context */
byte entered;     /* token of the last client that went inside */
bit  over;

#ifdef NOPOLL
bit asleep[N];
#endif

/* Verdicts. They stay 0 unless a property is broken. */
bit two_inside, older_granted, token_not_rising, not_just_the_newest;

#ifdef CRASH
/* What is on disk, and ghosts that a crash cannot turn back. */
byte disk_claim, disk_token, disk_holder;
byte seq[N], last_seq, last_token;
#define FLUSH disk_claim = row_claim; disk_token = row_token; disk_holder = row_holder
#define FLUSHED (disk_claim == row_claim && disk_token == row_token && disk_holder == row_holder)
#endif

#define NAME(i) (64 + N - i) /* A, B, C */

#ifdef LONGDELAY
#define UNTOLD(k) (dead[k] && phase[k] >= DELAY && phase[k] < END)
#else
#define UNTOLD(k) (dead[k] && phase[k] >= DELAY && phase[k] < END && !lost[k])
#endif

/* Who has not sat out its lock delay may not hand on a clean row. */
#ifdef FORGET
#define CLEARS(i) true
#else
#define CLEARS(i) (phase[i] >= HOLD || !unclean[i])
#endif

#ifdef CLEARANY
#define OWNS(i) (row_holder != 0)
#else
#define OWNS(i) (row_holder == i + 1)
#endif

/* ---- what the server does ---- */

/* Every other client is sent a hint; each copy may get lost. */
inline announce(i)
{
	row_claim++;
	claim[i] = row_claim;
#ifdef CRASH
	last_seq++;
	seq[i] = last_seq;
#endif
	printf("%c announces claim %d\n", NAME(i), claim[i]);
#ifndef STALEHINT
	hint[i] = 0; /* whatever is under way to me is older */
#endif
	k = 0;
	do
	:: k < N && k != i && phase[k] < DRAIN -> hint[k] = row_claim; k++
	:: k < N -> k++
	:: k == N -> break
	od;
	k = 0
}

/* The advisory lock is free and no claim is newer: one statement. */
inline grant(i)
{
	d_step {
		adv = i + 1;
		row_token++;
		token[i] = row_token;
		unclean[i] = (row_holder != 0);
		row_holder = i + 1;
		waitfor[i] = 0;
		k = 0;
		do
		:: k < N ->
			if
			:: unclean[i] && k != i && UNTOLD(k) -> waitfor[i] = waitfor[i] | (1 << k)
			:: else
			fi;
			k++
		:: k == N -> break
		od;
		k = 0;
		if
		:: unclean[i] -> printf("%c is granted token %d, predecessor unclean\n", NAME(i), token[i])
		:: else       -> printf("%c is granted token %d\n", NAME(i), token[i])
		fi;
#ifdef CRASH
		older_granted = (seq[i] != last_seq);
		token_not_rising = (token[i] <= last_token);
		last_token = token[i];
#ifndef ASYNCGRANT
		FLUSH;
#endif
#else
		older_granted = (claim[i] != row_claim);
#endif
		assert(!older_granted);
		assert(!token_not_rising)
	}
}

/* Release: also notifies the waiters, which matters only without polls. */
inline give_back(i)
{
	if
	:: row_holder == i + 1 && CLEARS(i) -> row_holder = 0
	:: else
	fi;
	if
	:: adv == i + 1 -> adv = 0
	:: else
	fi;
#ifdef NOPOLL
	k = 0;
	do
	:: k < N && k != i -> asleep[k] = 0; k++
	:: k < N -> k++
	:: k == N -> break
	od;
	k = 0
#endif
}

/* A lost holder that has ended may clear its own mark with a new session. */
inline give_back_late(i)
{
	if
	:: OWNS(i) && CLEARS(i) -> row_holder = 0
	:: true
	fi
}

/* ---- what the client does ---- */

/* Nobody's lock delay has to go on because of client i. */
inline unwait(i)
{
	k = 0;
	do
	:: k < N -> waitfor[k] = waitfor[k] & ~(1 << i); k++
	:: k == N -> break
	od;
	k = 0
}

inline finish(i, how)
{
	d_step {
		phase[i] = how;
		unwait(i);
		claim[i] = 0; token[i] = 0; unclean[i] = 0; waitfor[i] = 0;
		hint[i] = 0; lost[i] = 0; giveup[i] = 0
	}
}

/* The end of a hold. A session that is cut may or may not still be heard. */
inline leave(i, how)
{
	if
	:: !cut[i] -> give_back(i); printf("%c releases\n", NAME(i)); finish(i, how)
	:: cut[i] && !dead[i] -> give_back(i); printf("%c releases, and gets no answer\n", NAME(i)); finish(i, LOST)
	:: cut[i] -> give_back_late(i); printf("%c leaves without a session\n", NAME(i)); finish(i, LOST)
	fi
}

#ifdef STRICT
#define INSIDE(k) (phase[k] == HOLD || phase[k] == DRAIN)
#else
#define INSIDE(k) ((phase[k] == HOLD || phase[k] == DRAIN) && !lost[k])
#endif

inline enter(i)
{
	d_step {
		printf("%c goes inside\n", NAME(i));
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
		token_not_rising = (token[i] <= entered);
		assert(!token_not_rising);
		entered = token[i];
		unclean[i] = 0; waitfor[i] = 0;
		phase[i] = HOLD
	}
}

/* Time: 9 s < 10 s. See README.md. */
#ifdef NODELAY
#define DELAY_OVER(i) true
#else
#define DELAY_OVER(i) (waitfor[i] == 0)
#endif

#ifdef STALEHINT
#define HINTED(i) (hint[i] != 0 && hint[i] != claim[i])
#else
#define HINTED(i) (hint[i] > claim[i])
#endif

#ifdef NOBEAT
#define BEAT(i) false
#else
#define BEAT(i) (!cut[i] && row_claim > claim[i])
#endif

#ifdef NOPOLL
#define AWAKE(i) (!asleep[i])
#else
#define AWAKE(i) true
#endif

#ifdef NOCHECK
#define NEWER(i) false
#else
#define NEWER(i) (row_claim > claim[i])
#endif

proctype Client(byte i)
{
	byte k;

	/* announce */
	atomic {
		if
		:: !dead[i] ->
			announce(i);
			if
			:: cut[i] -> printf("%c gets no answer\n", NAME(i)); finish(i, LOST); goto out
			:: else   -> phase[i] = WAIT
			fi
		:: cut[i] -> finish(i, LOST); goto out
#ifdef CRASH
		:: dead[i] -> /* starts only after the crash */
			cut[i] = 0; dead[i] = 0;
			announce(i);
			phase[i] = WAIT
#endif
		fi
	}

	/*
	 * Wait. An attempt that finds the key busy changes nothing, so it is
	 * not a step: a poll is the attempt that finds something to do.
	 */
	do
	:: atomic { !cut[i] && AWAKE(i) && NEWER(i) ->
		printf("%c is refused: a newer claim exists\n", NAME(i)); finish(i, SUPERSEDED); goto out }
	:: atomic { !dead[i] && AWAKE(i) && !NEWER(i) && adv == 0 ->
		grant(i);
		if
		:: cut[i] -> printf("%c never hears of it\n", NAME(i)); finish(i, LOST); goto out
#ifdef RECONNECT
		:: cut[i] -> printf("%c never hears of it\n", NAME(i)); token[i] = 0; unclean[i] = 0; waitfor[i] = 0
#endif
		:: else   -> phase[i] = DELAY; break
		fi }
#ifdef NOPOLL
	:: atomic { AWAKE(i) && !NEWER(i) && adv != 0 -> asleep[i] = 1 }
#endif
	:: atomic { HINTED(i) ->
		printf("%c hears of a newer claim while waiting\n", NAME(i)); finish(i, SUPERSEDED); goto out }
	:: atomic { giveup[i] ->
		printf("%c gives up waiting\n", NAME(i)); finish(i, TIMEDOUT); goto out }
#ifdef RECONNECT
	:: atomic { dead[i] ->
		printf("%c goes on waiting with a new session\n", NAME(i)); cut[i] = 0; dead[i] = 0 }
#endif
	:: atomic { cut[i] ->
		printf("%c learns that its session is lost\n", NAME(i)); finish(i, LOST); goto out }
	od;

	/* Lock delay. A client that is cut and does not know it goes inside too. */
	if
	:: atomic { DELAY_OVER(i) -> enter(i) }
	:: atomic { HINTED(i) || BEAT(i) ->
		printf("%c is told during its lock delay\n", NAME(i)); leave(i, PREEMPTED); goto out }
	:: atomic { cut[i] ->
		printf("%c learns of its lost session during its lock delay\n", NAME(i)); leave(i, LOST); goto out }
	fi;

	/* Inside, undisturbed. */
	if
#ifdef STAY
	:: atomic { over -> leave(i, RELEASED); goto out }
#else
	:: atomic { leave(i, RELEASED); goto out }
#endif
	:: atomic { HINTED(i) ->
		printf("%c is told by a hint\n", NAME(i)); hint[i] = 0; phase[i] = DRAIN }
	:: atomic { BEAT(i) ->
		printf("%c is told by its heartbeat\n", NAME(i)); hint[i] = 0; phase[i] = DRAIN }
	:: atomic { cut[i] -> goto told_lost }
	fi;

	/* Inside, draining; ends by release or by revocation. */
	if
	:: atomic { cut[i] ->
told_lost:	printf("%c learns that its session is lost\n", NAME(i));
		hint[i] = 0;
		lost[i] = 1;
		phase[i] = DRAIN;
#ifndef LONGDELAY
		d_step { unwait(i) }
#endif
		}
	:: atomic { leave(i, PREEMPTED); goto out }
	fi;
	atomic { leave(i, LOST) };
out:
	skip
}

/*
 * What may happen to a client from outside, at any moment or never:
 * it gives up, or its session is lost. A lost session is two events: the
 * client gets no more answers; the server ends the session. The client may
 * learn of it before or after the second.
 */
proctype World(byte i)
{
	if
	:: skip
	:: phase[i] >= END
	:: atomic { phase[i] == WAIT -> giveup[i] = 1 }
	:: atomic { phase[i] < END -> printf("%c's session is cut off\n", NAME(i)); cut[i] = 1 };
		d_step {
			cut[i] = 1; dead[i] = 1;
			if
			:: adv == i + 1 -> adv = 0
			:: else
			fi;
			printf("the server ends %c's session\n", NAME(i))
		}
	fi
}

#ifdef CRASH
proctype Server()
{
	byte k;
	do
	:: d_step { !FLUSHED -> FLUSH }
	:: break
	:: d_step {
		row_claim = disk_claim; row_token = disk_token;
		row_holder = disk_holder;
		adv = 0;
		k = 0;
		do
		:: k < N ->
			if
			:: phase[k] < END -> cut[k] = 1; dead[k] = 1
			:: else
			fi;
			k++
		:: k == N -> break
		od;
		k = 0;
		printf("the server crashes; newest claim on disk %d, token %d\n", row_claim, row_token)
		};
		break
	od
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
			:: phase[k] == HOLD && claim[k] == row_claim
			:: phase[k] == PREEMPTED || phase[k] == SUPERSEDED
			:: else ->
				not_just_the_newest = 1;
				printf("at rest: %c is in phase %d with claim %d, newest is %d\n",
					NAME(k), phase[k], claim[k], row_claim)
			fi;
			if
			:: phase[k] == HOLD -> holders++
			:: else
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
			run Client(n);
#ifndef CALM
			run World(n);
#endif
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

/* All clients are alike, so what holds for the first holds for every one. */
#ifdef LTL_PREEMPT
ltl preempt { [] ((phase[0] == HOLD && row_claim > claim[0]) -> <> (phase[0] != HOLD)) }
#endif
#ifdef LTL_END
ltl ends { [] (phase[0] == WAIT -> <> (phase[0] >= END)) }
#endif
