package locker

import (
	"container/heap"
	"sync"
	"time"
)

// alarms calls expire of each lock whose deadline has passed. All locks of a provider share one
// timer. A deadline later than that for which the timer is set does not touch the timer, so a cycle
// that ends in time does not set it.
type alarms struct {
	// mu guards everything below, and the fields alarm and queued of the locks. It may be locked
	// while a lock's mu is held, but not the other way round.
	mu    sync.Mutex
	queue alarmQueue
	timer *time.Timer
	fires time.Time // when the timer fires, or zero if it is not set
}

// set sets the alarm of a lock, instead of an earlier one.
func (a *alarms) set(l *lock, at time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	l.alarm = at
	if l.queued > 0 {
		heap.Fix(&a.queue, l.queued-1)
	} else {
		heap.Push(&a.queue, l)
	}
	a.wakeLocked()
}

// drop removes the alarm of a lock, if there is one.
func (a *alarms) drop(l *lock) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if l.queued > 0 {
		heap.Remove(&a.queue, l.queued-1)
	}
}

// stop stops the timer if no lock has an alarm. A later call of set starts it again.
func (a *alarms) stop() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timer != nil && len(a.queue) == 0 {
		a.timer.Stop()
		a.fires = time.Time{}
	}
}

// wakeLocked makes the timer fire in time for the first alarm.
func (a *alarms) wakeLocked() {
	if len(a.queue) == 0 {
		return
	}
	first := a.queue[0].alarm
	if !a.fires.IsZero() && !first.Before(a.fires) {
		return
	}
	a.fires = first
	if a.timer == nil {
		a.timer = time.AfterFunc(time.Until(first), a.fire)
	} else {
		a.timer.Reset(time.Until(first))
	}
}

func (a *alarms) fire() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.fires = time.Time{}
	for now := time.Now(); len(a.queue) > 0 && !a.queue[0].alarm.After(now); {
		// The goroutine ends when expire has returned. It is separate because expire may call an
		// observer.
		go heap.Pop(&a.queue).(*lock).expire()
	}
	a.wakeLocked()
}

// alarmQueue is a heap ordered by alarm.
type alarmQueue []*lock

func (q alarmQueue) Len() int           { return len(q) }
func (q alarmQueue) Less(i, j int) bool { return q[i].alarm.Before(q[j].alarm) }

func (q alarmQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].queued, q[j].queued = i+1, j+1
}

func (q *alarmQueue) Push(l any) {
	*q = append(*q, l.(*lock))
	l.(*lock).queued = len(*q)
}

func (q *alarmQueue) Pop() any {
	last := len(*q) - 1
	l := (*q)[last]
	(*q)[last], *q = nil, (*q)[:last]
	l.queued = 0
	return l
}
