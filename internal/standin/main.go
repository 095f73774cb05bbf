// Command standin is a process that communicates like a service that still uses
// github.com/dollarshaveclub/acyl/pkg/locker. The migration tests run it next to this library. It
// was written from a description of the statements that such a service sends:
//
//   - The key of a pull request is its row of env_locks.
//   - A claim is announced by a NOTIFY on the channel that is named by the decimal key, with the JSON
//     {"id": …, "event": …, "lockKey": …}.
//   - To lock, a service waits in pg_advisory_lock on a separate connection, and then executes LISTEN
//     for that channel on another one.
//   - A notification with another ID than the holder's asks the holder to stop.
//   - To unlock, a service calls pg_advisory_unlock.
//
// It reads commands from standard input, one on each line, and writes events to standard output, as
// lines of JSON. NAME is the caller's name for a lock. When its input ends, the process ends, and
// everything that it holds is released.
//
//	key REPO PR
//	announce NAME KEY EVENT
//	lock NAME KEY
//	unlock NAME
//	flood NAME COUNT KEY...
package main

import (
	"bufio"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/lib/pq"
)

// report is one line of output.
type report struct {
	What  string `json:"what"` // key, announced, locked, notified, unlocked, flooded, failed
	Name  string `json:"name,omitempty"`
	Key   int64  `json:"key,omitempty"`
	ID    string `json:"id,omitempty"`    // notified: of the claim
	Event string `json:"event,omitempty"` // notified: of the claim
	Error string `json:"error,omitempty"` // failed
}

// message is the payload on a key's channel.
type message struct {
	ID      uuid.UUID `json:"id"`
	Event   string    `json:"event"`
	LockKey int64     `json:"lockKey"`
}

type process struct {
	uri  string
	wait time.Duration
	db   *sql.DB

	mu    sync.Mutex // guards out and locks
	out   *json.Encoder
	locks map[string]*lock
}

type lock struct {
	id       uuid.UUID
	key      int64
	conn     *sql.Conn        // has the advisory lock
	listener *pq.ListenerConn // receives other claims
}

func main() {
	uri := flag.String("uri", "", "the database")
	wait := flag.Duration("wait", 20*time.Second, "longest wait for a lock")
	flag.Parse()
	db, err := sql.Open("postgres", *uri)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	p := &process{uri: *uri, wait: *wait, db: db, out: json.NewEncoder(os.Stdout), locks: map[string]*lock{}}
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		words := strings.Fields(in.Text())
		if len(words) < 2 {
			p.report(report{What: "failed", Error: "bad command " + strconv.Quote(in.Text())})
			continue
		}
		// All commands run concurrently. The driver waits for earlier ones where the order matters.
		go func() {
			if err := p.do(words[0], words[1], words[2:]); err != nil {
				p.report(report{What: "failed", Name: words[1], Error: err.Error()})
			}
		}()
	}
}

func (p *process) report(r report) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// Encode fails when the driver has ended. Then the input ends, too.
	_ = p.out.Encode(r)
}

func (p *process) do(command, name string, args []string) error {
	ctx := context.Background()
	numbers := make([]int64, len(args)) // 0 for an argument that is no number
	for i, a := range args {
		numbers[i], _ = strconv.ParseInt(a, 10, 64)
	}
	switch {
	case command == "key" && len(args) == 1:
		return p.key(ctx, name, numbers[0])
	case command == "announce" && len(args) >= 2:
		l := p.lock(name, numbers[0])
		if err := p.notify(ctx, message{l.id, strings.Join(args[1:], " "), l.key}); err != nil {
			return err
		}
		p.report(report{What: "announced", Name: name, Key: l.key})
		return nil
	case command == "lock" && len(args) == 1:
		return p.acquire(ctx, name, p.lock(name, numbers[0]))
	case command == "unlock" && len(args) == 0:
		return p.release(ctx, name)
	case command == "flood" && len(args) >= 2:
		for i := range numbers[0] {
			key := numbers[1+int(i)%(len(numbers)-1)]
			if err := p.notify(ctx, message{uuid.New(), "flood", key}); err != nil {
				return err
			}
		}
		p.report(report{What: "flooded", Name: name})
		return nil
	}
	return errors.New("bad command " + strconv.Quote(command))
}

// lock returns the lock of that name. It creates the lock when the name is first used.
func (p *process) lock(name string, key int64) *lock {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.locks[name] == nil {
		p.locks[name] = &lock{id: uuid.New(), key: key}
	}
	return p.locks[name]
}

func (p *process) key(ctx context.Context, repo string, pr int64) error {
	const (
		find = `SELECT lock_key FROM env_locks WHERE repo = $1 AND pull_request = $2`
		add  = `INSERT INTO env_locks (lock_key, repo, pull_request) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING`
	)
	var key int64
	err := p.db.QueryRowContext(ctx, find, repo, pr).Scan(&key)
	if errors.Is(err, sql.ErrNoRows) {
		if _, err := p.db.ExecContext(ctx, add, 1+rand.Int64N(1<<62), repo, pr); err != nil {
			return err
		}
		err = p.db.QueryRowContext(ctx, find, repo, pr).Scan(&key)
	}
	if err != nil {
		return err
	}
	p.report(report{What: "key", Name: repo, Key: key})
	return nil
}

func channel(key int64) string { return strconv.FormatInt(key, 10) }

func (p *process) notify(ctx context.Context, m message) error {
	payload, err := json.Marshal(m)
	if err != nil {
		return err
	}
	_, err = p.db.ExecContext(ctx, "NOTIFY "+pq.QuoteIdentifier(channel(m.LockKey))+", "+pq.QuoteLiteral(string(payload)))
	return err
}

func (p *process) acquire(ctx context.Context, name string, l *lock) error {
	conn, err := p.db.Conn(ctx)
	if err != nil {
		return err
	}
	if _, err := conn.ExecContext(ctx, fmt.Sprintf("SET lock_timeout = %d", p.wait.Milliseconds())); err != nil {
		return errors.Join(err, conn.Close())
	}
	if _, err := conn.ExecContext(ctx, `SELECT pg_advisory_lock($1)`, l.key); err != nil {
		return errors.Join(err, conn.Close())
	}
	heard := make(chan *pq.Notification, 16)
	listener, err := pq.NewListenerConn(p.uri, heard)
	if err != nil {
		// The lock is kept, because the process is of no further use.
		return err
	}
	if _, err := listener.Listen(channel(l.key)); err != nil {
		return err
	}
	p.mu.Lock()
	l.conn, l.listener = conn, listener
	p.mu.Unlock()
	p.report(report{What: "locked", Name: name, Key: l.key})
	// The loop ends when the listener is closed.
	for n := range heard {
		var m message
		if err := json.Unmarshal([]byte(n.Extra), &m); err != nil {
			return err
		}
		if m.ID != l.id {
			p.report(report{What: "notified", Name: name, Key: m.LockKey, ID: m.ID.String(), Event: m.Event})
		}
	}
	return nil
}

func (p *process) release(ctx context.Context, name string) error {
	p.mu.Lock()
	l := p.locks[name]
	delete(p.locks, name)
	p.mu.Unlock()
	if l == nil || l.conn == nil {
		return errors.New("not locked")
	}
	var was bool
	if err := l.conn.QueryRowContext(ctx, `SELECT pg_advisory_unlock($1)`, l.key).Scan(&was); err != nil {
		return err
	}
	if !was {
		return errors.New("the server says that it was not locked")
	}
	p.report(report{What: "unlocked", Name: name, Key: l.key})
	return errors.Join(l.listener.Close(), l.conn.Close())
}
