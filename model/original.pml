/*
 * The order of steps in the library that this one replaces, for comparison:
 *
 *   1. NOTIFY   received only by sessions that LISTEN at that moment
 *   2. LISTEN
 *   3. a plain blocking advisory lock
 *
 * No row names the newest claim. The model assumes the best case: no message
 * and no session is ever lost, a waiter that receives a notification leaves
 * immediately, and no waiter gives up. The claim number is a ghost variable:
 * the order of NOTIFY.
 */

#ifndef N
#define N 2
#endif

#define INIT      0
#define WAIT      1
#define HOLD      2
#define ENDED     3

byte newest;
byte claim[N];
byte phase[N];
bit  listens[N];
bit  heard[N];
byte adv;
bit  older_wins;

#define NAME(i) (64 + N - i) /* A, B, C */

proctype Client(byte i)
{
	byte k;

	d_step {
		newest++;
		claim[i] = newest;
		printf("%c sends NOTIFY (claim %d)\n", NAME(i), claim[i]);
		do
		:: k < N ->
			if
			:: listens[k] -> heard[k] = 1; printf("  %c hears it\n", NAME(k))
			:: else ->
				if
				:: k != i -> printf("  %c does not LISTEN yet: it hears nothing\n", NAME(k))
				:: else
				fi
			fi;
			k++
		:: k == N -> break
		od;
		k = 0
	}
	d_step { listens[i] = 1; phase[i] = WAIT; printf("%c sends LISTEN\n", NAME(i)) }
	if
	:: d_step { adv == 0 -> adv = i + 1; phase[i] = HOLD; printf("%c gets the advisory lock\n", NAME(i)) }
	:: d_step { heard[i] -> phase[i] = ENDED; listens[i] = 0; printf("%c leaves the queue\n", NAME(i)) }; goto out
	fi;
	d_step { heard[i] -> adv = 0; phase[i] = ENDED; listens[i] = 0; printf("%c is told, drains and unlocks\n", NAME(i)) };
out:
	skip
}

#ifndef LTL_PREEMPT
/* When no step is possible any longer, only the newest may hold, and all others must have ended. */
proctype Judge()
{
	byte k;
	timeout;
	d_step {
		do
		:: k < N ->
			if
			:: phase[k] == HOLD && claim[k] != newest ->
				older_wins = 1;
				printf("at rest: %c (claim %d) holds, and is never notified\n", NAME(k), claim[k])
			:: phase[k] == WAIT ->
				older_wins = 1;
				printf("at rest: %c (claim %d) waits for ever\n", NAME(k), claim[k])
			:: else
			fi;
			k++
		:: k == N -> break
		od;
		assert(!older_wins);
		k = 0
	}
}
#endif

init
{
	byte n;
	atomic {
		do
		:: n < N -> run Client(n); n++
		:: n == N -> break
		od;
		n = 0;
#ifndef LTL_PREEMPT
		run Judge()
#endif
	}
}

#ifdef LTL_PREEMPT
ltl preempt { [] ((phase[0] == HOLD && newest > claim[0]) -> <> (phase[0] != HOLD)) }
#endif
