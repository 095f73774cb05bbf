package main

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// tell returns a history from lines such as "1.5 one #7 started b 2": seconds, replica, pull
// request, kind, delivery, token, reason. In a kind a hyphen stands for a space. "#0" is no pull
// request. Words such as mode=let_finish may follow anywhere after the delivery: mode, by, and for
// reports shows.
func tell(t *testing.T, lines string) []Event {
	t.Helper()
	var events []Event
	begin := time.Date(2024, 5, 1, 12, 0, 0, 0, time.UTC)
	for line := range strings.Lines(lines) {
		var f []string
		told := map[string]string{}
		for _, word := range strings.Fields(line) {
			if name, value, ok := strings.Cut(word, "="); ok {
				told[name] = value
			} else {
				f = append(f, word)
			}
		}
		if len(f) == 0 {
			continue
		}
		after, err := time.ParseDuration(f[0] + "s")
		require.NoError(t, err)
		e := Event{Time: begin.Add(after), Replica: f[1], Repo: "o/r", PR: uint(f[2][1] - '0'), Kind: strings.ReplaceAll(f[3], "-", " ")}
		if e.PR != 0 {
			e.Delivery = f[4]
			e.Event = "push " + f[4]
			e.Mode, e.By = told["mode"], told["by"]
			if e.By != "" && e.Kind == notified {
				e.Outcome = preempted
			}
			if e.Kind == sent {
				e.Page = "https://x/" + e.Delivery
			}
			if e.Kind == reports {
				e.Conclusion, e.Summary = "cancelled", "superseded by "+told["shows"]
			}
		} else if len(f) > 4 {
			e.Reason = strings.Join(f[4:], " ")
		}
		if len(f) > 5 {
			e.Token = int64(f[5][0] - '0')
		}
		if e.PR != 0 && len(f) > 6 {
			e.Reason = strings.Join(f[6:], " ")
		}
		events = append(events, e)
	}
	return events
}

// A history of three pull requests on two services. A job is stopped, a waiter is superseded, and
// two redeliveries are outdated, one of them of a running job. A service is killed, and its key
// is taken over. A job may finish, there is a successor and a delivery between the two, and a test
// is skipped.
const good = `
	0    one #0 listening
	0    two #0 listening
	0.9  one #7 sent a
	1    one #7 received a
	1.1  one #7 started a 1
	1    two #8 sent x
	1.1  two #8 started x 1
	2    two #7 sent b
	2.1  one #7 notified a 1 by=b
	2.2  one #7 sent c
	2.3  two #7 left b by=c
	2.31 two #7 reports b shows=https://x/c
	2.5  one #7 stopped a 1
	2.6  one #7 started c 2
	2.61 one #7 resent b
	2.62 one #7 outdated b
	2.63 one #7 resent c
	2.64 one #7 outdated c
	2.7  two #0 killed
	2.8  one #8 sent y
	3    one #9 sent k mode=let_finish
	3.1  one #9 started k 1
	3.2  one #9 sent l mode=let_finish
	3.3  one #9 sent m mode=let_finish
	3.4  one #9 left l by=m
	3.5  one #9 sent n mode=skip_if_busy
	3.6  one #9 skipped n by=k
	4    one #7 finished c 2
	4.1  one #9 finished k 1
	4.2  one #9 started m 2
	5.2  one #9 finished m 2
	12.8 one #8 started y 2
	14   one #8 finished y 2
	15   one #0 shutting-down
	16   one #0 exited
`

func TestJudgeAcceptsGoodHistory(t *testing.T) {
	events := tell(t, good)
	// The events come from several processes, in any order.
	slices.Reverse(events)
	pulls, faults := judge(events)
	require.Empty(t, faults)
	require.Len(t, pulls, 3)
	seven, eight, nine := pulls[0], pulls[1], pulls[2]
	counts := func(p *pull) []int {
		return []int{p.deliveries, p.ran, p.stopped, p.left, p.outdated, p.skipped, p.finished, p.killed, p.overlaps}
	}
	require.Equal(t, []int{5, 2, 1, 1, 2, 0, 1, 0, 0}, counts(seven))
	require.Equal(t, []int{2, 2, 0, 0, 0, 0, 1, 1, 0}, counts(eight))
	require.Equal(t, []int{4, 2, 0, 1, 0, 1, 2, 0, 0}, counts(nine))
	require.True(t, seven.newestFinished)
	require.True(t, eight.newestFinished)
	require.True(t, nine.newestFinished, "the skipped one does not count")
}

func TestJudgeIsLoud(t *testing.T) {
	for name, tc := range map[string]struct {
		change []string // pairs: the end of a line in good, and its replacement
		want   []string // parts of the faults, in order
	}{
		"two together": {
			[]string{"2.5  one #7 stopped a 1", "2.65 one #7 stopped a 1"},
			[]string{"2.600  #7: two ran together: push c on one started while push a ran on one"},
		},
		"two together on two services": {
			[]string{"2.3  two #7 left b", "2.3  two #7 started b 2\n2.4 two #7 stopped b 2", "started c 2", "started c 3", "finished c 2", "finished c 3"},
			[]string{"two ran together: push b on two started while push a ran on one"},
		},
		"an end told by the wrong service": {
			[]string{"2.3  two #7 left b", "2.3  two #7 left b\n2.7 two #7 stopped a 1", "2.5  one #7 stopped a 1", "2.9  one #7 stopped a 1"},
			[]string{"two ran together", "push a stopped without having started"},
		},
		"newest stopped": {
			[]string{"finished c", "stopped c"},
			[]string{"#7: the newest delivery, push c, did not finish"},
		},
		"newest left": {
			[]string{"2.6  one #7 started c 2", "", "4    one #7 finished c 2", "4 one #7 left c"},
			[]string{"#7: the newest delivery, push c, did not finish"},
		},
		"newest still running at the end": {
			[]string{"4    one #7 finished c 2", ""},
			[]string{"#7: push c started and never ended", "#7: the newest delivery, push c, did not finish"},
		},
		"only an older one finished": {
			[]string{"2.6  one #7 started c 2", "2.6 one #7 left c", "2.3  two #7 left b", "2.6 two #7 started b 2", "4    one #7 finished c 2", "2.65 two #7 finished b 2"},
			[]string{"#7: the newest delivery, push c, did not finish"},
		},
		"a delivery without an end": {
			[]string{"2.3  two #7 left b", "", "2    two #7 sent b", "2 one #7 sent b"},
			[]string{"#7: nothing was heard of push b"},
		},
		"token goes backwards": {
			[]string{"started a 1", "started a 3", "notified a 1", "notified a 3", "stopped a 1", "stopped a 3"},
			[]string{"#7: the token went from 3 to 2 with push c"},
		},
		"token stands still": {
			[]string{"started y 2", "started y 1", "finished y 2", "finished y 1"},
			[]string{"#8: the token went from 1 to 1 with push y"},
		},
		"no token": {
			[]string{"started a 1", "started a 0", "stopped a 1", "stopped a 0"},
			[]string{"#7: the token went from 0 to 0 with push a"},
		},
		"token changes during a job": {
			[]string{"finished c 2", "finished c 3"},
			[]string{"#7: push c started with token 2 and ended with 3"},
		},
		"older after newer": {
			[]string{"2.3  two #7 left b", "4.1 one #7 started b 3\n4.2 one #7 finished b 3"},
			[]string{"#7: push b ran after the newer push c"},
		},
		"successor too early": {
			[]string{"12.8 one", "12.6 one"},
			[]string{"#8: push y took over 9.9 s after a holder was killed; the session timeout is 10 s"},
		},
		"newest outdated": {
			[]string{"2.2  one #7 sent c\n", "2.2 one #7 sent c\n2.24 one #7 sent d\n2.25 one #7 outdated d\n"},
			[]string{"#7: push d was outdated, though nothing newer had been sent", "#7: the newest delivery, push d, did not finish"},
		},
		"an older one outdated": {
			[]string{"2.3  two #7 left b", "2.3  two #7 outdated b"},
			nil,
		},
		"a late redelivery runs": {
			[]string{"2.62 one #7 outdated b", "4.1 one #7 started b 3\n4.2 one #7 finished b 3"},
			[]string{"#7: push b ran after the newer push c"},
		},
		"a redelivery of what runs does so too": {
			[]string{"2.64 one #7 outdated c", "2.64 one #7 started c 3\n4.2 one #7 finished c 3"},
			[]string{"#7: two ran together: push c on one started while push c ran on one"},
		},
		"a delivery without an end, whose redelivery had one elsewhere": {
			[]string{
				"2    two #7 sent b", "2 one #7 sent b\n2.05 two #7 resent b\n2.06 two #7 outdated b",
				"2.3  two #7 left b", "", "2.61 one #7 resent b", "", "2.62 one #7 outdated b", "",
			},
			[]string{"#7: nothing was heard of push b"},
		},
		"a redelivery of which nothing is heard": {
			[]string{"2.64 one #7 outdated c", ""},
			[]string{"#7: nothing was heard of push c"},
		},
		"a job disturbed by its own redelivery": {
			[]string{"2.64 one #7 outdated c", "2.64 one #7 notified c 2 by=c\n2.65 one #7 outdated c"},
			[]string{"#7: push c was disturbed by its own redelivery", "#7: push c was notified, though everything newer lets it finish"},
		},
		"a job that failed": {
			[]string{"2.3  two #7 left b", "2.3  two #7 failed b"},
			[]string{"#7: push b failed"},
		},
		"a job that is notified by one that lets it finish": {
			[]string{"3.4  one #9 left l by=m", "3.35 one #9 notified k 1 by=m\n3.4 one #9 left l by=m"},
			[]string{"#9: push k was notified, though everything newer lets it finish"},
		},
		"a job that is notified by a newer one on a branch where others let it finish": {
			[]string{"3.3  one #9 sent m mode=let_finish", "3.3 one #9 sent m mode=preempt\n3.35 one #9 notified k 1 by=m"},
			nil,
		},
		"a job that is notified by one that may be skipped": {
			[]string{"3.6  one #9 skipped n by=k", "3.6 one #9 notified k 1 by=n\n3.7 one #9 skipped n by=k"},
			[]string{"#9: push k was disturbed by push n, which takes the lock only if it is free", "#9: push k was notified, though everything newer lets it finish"},
		},
		"a waiter displaced by one that may be skipped": {
			[]string{"3.4  one #9 left l by=m", "3.55 one #9 left l by=n"},
			[]string{"#9: push l was disturbed by push n, which takes the lock only if it is free"},
		},
		"skipped without a reason": {
			[]string{"3.5  one #9 sent n mode=skip_if_busy", "", "3.6  one #9 skipped n by=k", "6 one #9 sent n mode=skip_if_busy\n6.1 one #9 skipped n by=m"},
			[]string{"#9: push n was skipped for m, which was not at work"},
		},
		"skipped while what is named has just ended": {
			[]string{"3.6  one #9 skipped n by=k", "4.15 one #9 skipped n by=k"},
			nil,
		},
		"one that may be skipped runs": {
			[]string{"3.5  one #9 sent n mode=skip_if_busy", "", "3.6  one #9 skipped n by=k", "6 one #9 sent n mode=skip_if_busy\n6.1 one #9 started n 3\n6.2 one #9 finished n 3"},
			nil,
		},
		"one that may be skipped waits": {
			[]string{"3.6  one #9 skipped n by=k", "4.15 one #9 started n 2\n4.18 one #9 finished n 2", "started m 2", "started m 3", "finished m 2", "finished m 3"},
			[]string{"#9: push n waited for another job, and should have been skipped"},
		},
		"one that may be skipped is superseded while it waits": {
			[]string{"3.6  one #9 skipped n by=k", "3.6 one #9 left n by=m"},
			[]string{"#9: push n waited for another job, and should have been skipped"},
		},
		"a push skipped that has to wait": {
			[]string{"3.4  one #9 left l by=m", "3.4 one #9 skipped l by=k"},
			[]string{"#9: push l was skipped, though it has to wait for its turn"},
		},
		"a commit that shows another one than what has taken its place": {
			[]string{"shows=https://x/c", "shows=https://x/a"},
			[]string{"#7: push b shows \"superseded by https://x/a\", and not that https://x/c has taken its place"},
		},
		"a job that was not asked for": {
			[]string{"2    two #7 sent b", ""},
			[]string{"#7: push a was notified, though everything newer lets it finish", "#7: push b left, but was never sent", "#7: push b reports, but was never sent", "#7: push b outdated, but was never sent"},
		},
		"a service that crashed": {
			[]string{"16   one #0 exited", "16   one #0 exited exit status 2"},
			[]string{"one did not end well: exit status 2"},
		},
		"a service that never ended": {
			[]string{"16   one #0 exited", ""},
			[]string{"one never ended"},
		},
		"a line that cannot be read": {
			[]string{"15   one #0 shutting-down", "15 one #0 failed unreadable line"},
			[]string{"one: unreadable line"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			history := good
			for pair := range slices.Chunk(tc.change, 2) {
				require.Equal(t, 1, strings.Count(history, pair[0]), "%q must stand in the history once", pair[0])
				history = strings.Replace(history, pair[0], pair[1], 1)
			}
			_, faults := judge(tell(t, history))
			for i, want := range tc.want {
				require.Greater(t, len(faults), i, "missing: %s; have: %q", want, faults)
				require.Contains(t, faults[i], want)
			}
			require.Len(t, faults, len(tc.want), "%q", faults)
		})
	}

	_, faults := judge(nil)
	require.Equal(t, []string{"nothing was delivered"}, faults)
}
