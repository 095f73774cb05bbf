package locker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"database/sql"
	"encoding/pem"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/user"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lib/pq"
	"github.com/pkg/errors"
	"github.com/preemptable/locker/internal/pgserver"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// Tests of the connection to the server: connection strings, the environment, credentials that
// change, sockets, TLS, pools, and the encoding of the database.

// configOf returns the configuration that the library uses for a connection string.
func configOf(t testing.TB, uri string) pq.Config {
	t.Helper()
	dsn, err := sessionDSN(uri)
	require.NoError(t, err, uri)
	cfg, err := connectConfig(dsn)
	require.NoError(t, err, uri)
	return cfg
}

// B1, B4: hosts with ports, and sockets, mean the same in a URL as in pairs, regardless of the
// result of url.Parse.
func TestConnectHosts(t *testing.T) {
	// An empty URI keeps that of an earlier option.
	named, err := NewPostgresProvider("host=h", WithPostgresBackend("", ""))
	require.NoError(t, err)
	require.NoError(t, named.Close())
	for uri, pairs := range map[string]string{
		"postgres://a:5432,b:5433/db":                                       "host=a,b port=5432,5433 dbname=db",
		"postgres://user:" + secret + "@a:1,b/db?sslmode=allow":             "host=a,b port=1,5432 user=user password=" + secret + " dbname=db sslmode=allow",
		"postgresql://user@a,b:7?connect_timeout=3":                         "host=a,b port=5432,7 user=user connect_timeout=3",
		"postgres://u%40x:%2F%3A@[::1]:1,[fe80::1]:2/d%20b":                 `host=::1,fe80::1 port=1,2 user=u@x password=/: dbname='d b'`,
		"postgres://[::1],[fe80::1]/db":                                     "host=::1,fe80::1 dbname=db",
		"postgres://%2Fvar%2Frun/db":                                        "host=/var/run dbname=db",
		"postgres://user@%2fvar%2frun:5433/db":                              "host=/var/run port=5433 user=user dbname=db",
		"postgres:///db?host=/var/run&port=5433":                            "host=/var/run port=5433 dbname=db",
		"postgres://u@[::1]/db":                                             "host=::1 user=u dbname=db",
		"postgres://u@:5433?dbname=db&password=" + secret:                   "port=5433 user=u password=" + secret + " dbname=db",
		"postgres://h:6432/db?user=u":                                       "host=h port=6432 user=u dbname=db",
		"postgres://u:" + secret + "@h:/db?host=&password=&port=6432&user=": "host=h port=6432 user=u password=" + secret + " dbname=db",
	} {
		require.Equal(t, meaning(configOf(t, pairs)), meaning(configOf(t, uri)), uri)
	}
	for _, uri := range []string{
		"postgres://user:" + secret + "@a:1,b:2/db?port=3,4", "postgres://user:" + secret + "@a:1,b:2/db?host=c",
		"postgres://user:" + secret + "@%2Frun/db?host=c", "postgres://user:" + secret + "@%2Frun%2Ca/db",
		"postgres://user:" + secret + "@localhost/db?host=/cloudsql/a:b:c", "postgres://h:5432/db?port=6432", "postgres://:5432/db?port=6432",
	} {
		_, err := sessionDSN(uri)
		requireRefused(t, err, "host=a,b port=5432,5433")
	}
	for _, uri := range []string{"postgres://u@h/db?user=v", "postgres://u:" + secret + "@h/db?password=" + secret, "postgres://h/db?dbname=other"} {
		_, err := sessionDSN(uri)
		requireRefused(t, err, "once, before the ? or after it")
	}
	// Strings in a mixed form: the host would be quoted as one that is not found.
	for _, uri := range []string{
		"postgres://h user=u password=" + secret, "postgres://u:" + secret + "@h\n", "host=h;password=" + secret, "postgres://h;password=" + secret + "/db",
	} {
		_, err := sessionDSN(uri)
		requireRefused(t, err, "URI is invalid")
	}
	// The driver would turn TLS off for all of them, or ask for it on the socket.
	for _, uri := range []string{
		"host=/run,db sslmode=verify-full password=" + secret, "host=db,/run", "host=@name,db", "postgres:///db?host=/run,db", "postgres://%2Frun,db/db",
	} {
		_, err := sessionDSN(uri)
		requireRefused(t, err, "either hosts or the folders of sockets")
	}
	require.Len(t, configOf(t, "host=/run,@name").Multi, 1)
	require.Len(t, configOf(t, "host=/run,db hostaddr=127.0.0.1,127.0.0.2").Multi, 1)
	t.Setenv("PGHOST", "db,/run")
	_, err = sessionDSN("dbname=db")
	requireRefused(t, err, "either hosts or the folders of sockets")
	// The driver would connect to the other hosts of the variable as well.
	t.Setenv("PGHOST", "a,b,,d")
	require.Len(t, configOf(t, "dbname=db").Multi, 3)
	for _, uri := range []string{"postgres://h/db", "host=h", "host=a,c"} {
		_, err := sessionDSN(uri)
		requireRefused(t, err, "environment variable PGHOST")
	}
}

// One of several hosts refuses the login, and the other one is not there for a moment: the claim
// waits for it. If all refuse, it fails immediately. The errors of several hosts are one line.
func TestConnectSeveralHostsFail(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	one, other := newFieldProxy(t, uri), newFieldProxy(t, uri)
	both := strings.Replace(one.uri(t, uri), one.listener.Addr().String(), one.listener.Addr().String()+","+other.listener.Addr().String(), 1)
	claim := func() <-chan fieldResult {
		p := pgProvider(t, both)
		return fieldGo(func() error {
			_, _, err := fieldLock(t, p, 1, "claim")
			return err
		})
	}
	one.refuseLogins("28000", "no pg_hba.conf entry")
	other.refuseLogins("28P01", "password authentication failed")
	r := pgReceive(t, "the claim ends", claim())
	require.True(t, isRefusal(r.err), "%v", r.err)
	require.NotErrorIs(t, r.err, ErrLockTimeout)
	requireOneLine(t, r.err)
	require.ErrorContains(t, r.err, "no pg_hba.conf entry")
	require.ErrorContains(t, r.err, "password authentication failed")

	// The refused login counts: too many of them lock an account.
	require.True(t, isLogin(r.err))
	other.refuseLogins("57P03", "the database system is starting up")
	dsn, err := staticDSN(both)
	require.NoError(t, err)
	_, err = openLink(t.Context(), dsn, nil, time.Minute)
	require.True(t, isLogin(err), "%v", err)
	require.False(t, isRefusal(err), "%v", err)
	waits := claim()
	since := time.Now()
	pgUntil(t, "it has tried three times", func() bool { return other.loginsSince(since) > 3 })
	other.refuseLogins("", "")
	require.NoError(t, pgReceive(t, "the claim ends", waits).err)
}

// requireOneLine fails the test unless an error is one line, even with its stack.
func requireOneLine(t testing.TB, err error) {
	t.Helper()
	require.NotContains(t, fmt.Sprintf("%+v", err), "\n")
}

// A server that does not know a setting of all supported versions is too old.
func TestConnectOldServer(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	old := newFieldProxy(t, uri)
	old.set(func(r *fieldProxy) {
		r.hook = func(_ *fieldConn, _ direction, message []byte) (verdict, []byte) {
			return pass, bytes.ReplaceAll(message, []byte("idle_session_timeout"), []byte("idle_nothing_timeout"))
		}
	})
	p := pgProvider(t, old.uri(t, uri))
	_, err := p.LockKey(t.Context(), "repo", 1)
	require.ErrorContains(t, err, "PostgreSQL 14 or later is needed")
	require.NotErrorIs(t, err, ErrLockTimeout)
}

// A view that is missing is created at first use. A role that may not create it can lock nevertheless.
func TestConnectViewMissing(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	pgExec(t, db, SchemaSQL)
	pgExec(t, db, `DROP VIEW env_lock_overview`)
	p := pgProvider(t, uri)
	fieldWorks(t, p, 1)
	_, err := p.ListLocks(t.Context())
	require.NoError(t, err)

	pgExec(t, db, `DROP VIEW env_lock_overview`)
	role := pgRole(t, db)
	pgExec(t, db, `GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO `+role)
	weak := pgProvider(t, pgAs(t, uri, role))
	fieldWorks(t, weak, 1)
	_, err = weak.ListLocks(t.Context())
	require.ErrorContains(t, err, "env_lock_overview")
}

// C31: a URL in the place of a host, a user or a database is not shown.
func TestConnectURLInside(t *testing.T) {
	url := "postgres://user:" + secret + "@db/app"
	for _, pairs := range []string{"host=" + url, "host=h," + url, "dbname=" + url, "user=" + url} {
		_, err := sessionDSN(pairs)
		requireRefused(t, err, "is a URL")
	}
	for _, variable := range []string{"PGHOST", "PGDATABASE", "PGUSER"} {
		t.Run(variable, func(t *testing.T) {
			t.Setenv(variable, url)
			_, err := sessionDSN("sslmode=disable")
			requireRefused(t, err, "is a URL")
		})
	}
}

// B3: parameters of other drivers are rejected by name before anything is sent. Settings of the
// server pass. A parameter that the server does not know is rejected at first use.
func TestConnectParameters(t *testing.T) {
	tr := newDeadEnd(t)
	for _, name := range []string{
		"pool_max_conns", "schema", "pgbouncer", "default_query_exec_mode", "channel_binding", "gssencmode", "keepalives",
		"currentSchema", "connection_limit", "x-migrations-table", "statement-cache-capacity", "ssl", "uselibpqcompat",
	} {
		for _, call := range constructors(t) {
			requireRefused(t, call(tr.uri+"&"+name+"=1"), "parameter "+name+",")
			requireRefused(t, call("host=127.0.0.1 password="+secret+" "+name+"=1"), "parameter "+name+",")
		}
	}
	_, err := sessionDSN(tr.uri + "&connect_timeout=" + secret)
	requireRefused(t, err, "value of connect_timeout")
	_, err = sessionDSN("host=h password=" + secret + " no-setting=1")
	requireRefused(t, err, "URI is invalid")
	tr.requireNoCaller(t)

	uri := newDatabase(t)
	for _, settings := range []string{"&search_path=public&work_mem=8MB&TimeZone=UTC", "&my.own=1", "&options=-c%20geqo%3Doff", "&tcp_user_timeout=9s"} {
		fieldWorks(t, pgProvider(t, uri+settings), 1)
	}
	for name, setting := range map[string]string{"no_such_parameter": "&no_such_parameter=1", "shared_buffers": "&shared_buffers=1MB"} {
		_, err := pgProvider(t, uri+setting).LockKey(t.Context(), "repo", 1)
		require.ErrorContains(t, err, name)
		require.ErrorContains(t, err, "a parameter of the postgres URI")
		require.NotErrorIs(t, err, ErrLockTimeout)
	}
}

// B2: the error names the variable of the environment that the driver rejects.
func TestConnectEnvironment(t *testing.T) {
	const uri = "postgres://user:" + secret + "@host/db"
	for variable, value := range map[string]string{
		"PGGSSENCMODE": "prefer", "PGCHANNELBINDING": "require", "PGREQUIREAUTH": "scram-sha-256", "PGSSLCRL": "/crl",
		"PGPORT": "tcp://10.0.0.1:5432/" + secret, "PGSSLMODE": secret, "PGCONNECT_TIMEOUT": "soon", "PGTARGETSESSIONATTRS": "best",
		"PGCLIENTENCODING": "LATIN1", "PGDATESTYLE": "German", "PGMINPROTOCOLVERSION": "3.2", "PGSSLNEGOTIATION": "direct",
		"PGSSLMINPROTOCOLVERSION": "TLSv1.3", "PGSSLMAXPROTOCOLVERSION": "TLSv1.2",
	} {
		t.Run(variable, func(t *testing.T) {
			t.Setenv(variable, value)
			target := uri
			if variable == "PGSSLNEGOTIATION" {
				target += "?sslmode=prefer"
			}
			for _, call := range constructors(t) {
				requireRefused(t, call(target), "environment variable "+variable)
			}
		})
	}
	t.Run("TLS version", func(t *testing.T) {
		t.Setenv("PGSSLMINPROTOCOLVERSION", "TLSv1.2")
		_, err := sessionDSN(uri)
		requireRefused(t, err, "set ssl_min_protocol_version in the URI")
		require.Equal(t, pq.SSLProtocolVersion("TLSv1.3"), configOf(t, uri+"?ssl_min_protocol_version=TLSv1.3").SSLMinProtocolVersion)
	})
	t.Run("TLS", func(t *testing.T) {
		for variables, want := range map[[2]string]pq.SSLMode{
			{}:                              pq.SSLModeRequire,
			{"PGSSLMODE", "disable"}:        pq.SSLModeDisable,
			{"PGSSLMODE", "verify-ca"}:      pq.SSLModeVerifyCA,
			{"PGSSLROOTCERT", "system"}:     pq.SSLModeVerifyFull,
			{"PGHOST", "/var/run"}:          pq.SSLModeRequire, // the URI's host takes precedence
			{"PGTARGETSESSIONATTRS", "any"}: pq.SSLModeRequire,
		} {
			t.Run(variables[0], func(t *testing.T) {
				if variables[0] != "" {
					t.Setenv(variables[0], variables[1])
				}
				require.Equal(t, want, configOf(t, uri).SSLMode)
			})
		}
		// A socket has no TLS.
		t.Setenv("PGHOST", "/var/run")
		for _, uri := range []string{"dbname=db", "postgres:///db", "postgres://"} {
			require.Equal(t, pq.SSLModeDisable, configOf(t, uri).SSLMode)
		}
	})
}

// A service file is read before each connection, and its sslmode applies.
func TestConnectServiceFile(t *testing.T) {
	uri, err := url.Parse(newDatabase(t))
	require.NoError(t, err)
	password, _ := uri.User.Password()
	file := filepath.Join(t.TempDir(), "services")
	service := fmt.Sprintf("[locker]\nhost=%s\nport=%s\nuser=%s\npassword=%s\ndbname=%s\nsslmode=disable\n",
		uri.Hostname(), uri.Port(), uri.User.Username(), password, uri.Path[1:])
	require.NoError(t, os.WriteFile(file, []byte("[other]\nhost=nowhere.invalid\n\n"+service), 0o600))
	t.Setenv("PGSERVICEFILE", file)
	fieldWorks(t, pgProvider(t, "service=locker"), 1)
	fieldWorks(t, pgProvider(t, "postgres://?service=locker"), 2)
	// The service file takes precedence.
	fieldWorks(t, pgProvider(t, "service=locker sslmode=require port=1"), 2)
	_, err = NewLockProvider(PostgresLockProviderKind, WithPostgresBackend("service=missing password="+secret, ""))
	requireRefused(t, err, "PGSERVICEFILE")
	t.Setenv("PGSERVICE", "locker")
	fieldWorks(t, pgProvider(t, "postgres://"), 3)
}

// A connect_timeout applies, wherever it is set. It is reduced if all attempts together would take
// longer than openTimeout.
func TestConnectTimeout(t *testing.T) {
	file := filepath.Join(t.TempDir(), "services")
	require.NoError(t, os.WriteFile(file, []byte("[long]\nconnect_timeout=300\n[short]\nconnect_timeout=2\n[endless]\nconnect_timeout=0\n[three]\nhost=a,b,c\n"), 0o600))
	t.Setenv("PGSERVICEFILE", file)
	requireTimeout := func(t *testing.T, uri string, want time.Duration) {
		t.Helper()
		require.Equal(t, want, configOf(t, uri).ConnectTimeout, uri)
	}
	for parameters, want := range map[string]time.Duration{
		"": 5, "connect_timeout=300": 8, "connect_timeout=9": 8, "connect_timeout=8": 8, "connect_timeout=7": 7, "connect_timeout=1": 1,
		"connect_timeout=0": 5, "connect_timeout=-1": 5, "sslmode=prefer": 4, "sslmode=allow connect_timeout=300": 4,
		"service=long": 8, "service=short": 2, "service=endless": 5, "service=three": 2, "service=short connect_timeout=300": 2, "service=long connect_timeout=1": 8,
	} {
		requireTimeout(t, "host=h "+parameters, want*time.Second)
		requireTimeout(t, "postgres://h/db?"+strings.ReplaceAll(parameters, " ", "&"), want*time.Second)
	}
	for hosts, want := range map[string]time.Duration{"a,b": 4, "a,b,c": 2, "a,b,c,d": 2, "a,b,c,d,e": 1, "a,b,c,d,e,f,g,h,i": 1} {
		requireTimeout(t, "host="+hosts, want*time.Second)
		requireTimeout(t, "host="+hosts+" connect_timeout=300", want*time.Second)
		requireTimeout(t, "postgres://"+hosts+"/db?connect_timeout=1", time.Second)
	}
	t.Setenv("PGCONNECT_TIMEOUT", "300")
	requireTimeout(t, "host=h", 8*time.Second)
	requireTimeout(t, "host=h connect_timeout=3", 3*time.Second)
}

// The listener and the session's connection are opened with a connection string that replaces the
// caller's. It means the same, whatever the service file and the environment contain.
func TestConnectString(t *testing.T) {
	file := filepath.Join(t.TempDir(), "services")
	require.NoError(t, os.WriteFile(file, []byte(`[one]
host=h
port=5433
password=it's \ `+secret+`
dbname=
[several]
host=a,,c
port=1,2,3
target_session_attrs=primary
load_balance_hosts=random
[addresses]
hostaddr=127.0.0.1,::1
sslmode=verify-full
sslrootcert=system
[both]
host=a,b
hostaddr=127.0.0.1,
sslsni=0
sslnegotiation=direct
sslmode=require
[socket]
host=/var/run
application_name=me
options=-c geqo=off
passfile=/passfile
[nothing]
`), 0o600))
	t.Setenv("PGSERVICEFILE", file)
	check := func(t *testing.T) {
		for _, uri := range []string{
			"service=one", "service=several", "service=addresses", "service=both", "service=socket", "service=nothing",
			"host=,b", "host=,b port=1,2",
			"postgres://user:" + secret + "@x:1/db?service=nothing&search_path=a,%20b&my.own='", "service=one user='' dbname='' password=''", "host=h",
		} {
			want := configOf(t, uri)
			got, err := pq.NewConfig(connectionString(want))
			require.NoError(t, err, uri)
			require.Empty(t, got.Service)
			for _, f := range reflect.VisibleFields(reflect.TypeFor[pq.Config]()) {
				if f.IsExported() && f.Name != "Service" && f.Name != "ServiceFile" {
					require.EqualValues(t, reflect.ValueOf(want).FieldByIndex(f.Index).Interface(), reflect.ValueOf(got).FieldByIndex(f.Index).Interface(), "%s: %s", uri, f.Name)
				}
			}
		}
	}
	check(t)
	for variable, value := range map[string]string{
		"PGSERVICE": "one", "PGUSER": "else", "PGPASSWORD": "else", "PGDATABASE": "else", "PGOPTIONS": "-c geqo=on", "PGAPPNAME": "else",
		"PGPASSFILE": "/else", "PGPORT": "9", "PGSSLCERT": "/else", "PGCONNECT_TIMEOUT": "300", "PGSSLSNI": "0",
	} {
		t.Setenv(variable, value)
	}
	check(t)
	t.Setenv("PGSERVICE", "")
	// The driver appends the lists of the environment.
	same := func(t *testing.T, uri string, multi int) {
		want := configOf(t, uri)
		require.Len(t, want.Multi, multi, uri)
		got, err := pq.NewConfig(connectionString(want))
		require.NoError(t, err, uri)
		require.Equal(t, meaning(want), meaning(got), uri)
	}
	t.Run("hosts", func(t *testing.T) {
		t.Setenv("PGHOST", "a,b")
		t.Setenv("PGPORT", "5432")
		same(t, "postgres://u:"+secret+"@/db", 1)
		t.Setenv("PGPORT", "1,2")
		same(t, "dbname=db", 1)
	})
	t.Run("ports", func(t *testing.T) {
		t.Setenv("PGPORT", "1,2")
		same(t, "host=a,b", 1)
		same(t, "host=a", 0)
	})
	t.Run("addresses", func(t *testing.T) {
		t.Setenv("PGHOSTADDR", "127.0.0.1,::1")
		t.Setenv("PGPORT", "7")
		same(t, "dbname=db", 1)
	})
}

// Neither Close nor a call that is canceled waits for a long connect_timeout when the server has
// become silent.
func TestConnectTimeoutOfASilentServer(t *testing.T) {
	t.Parallel()
	attempts := func(s *session) int64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.connections
	}
	// silent returns when the session's connection is being opened again, in vain.
	silent := func(t *testing.T, px *proxy, s *session) {
		before := attempts(s)
		px.silence(toServer, toClient)
		pgUntil(t, "an attempt to connect is under way", func() bool { return attempts(s) > before })
	}
	t.Run("Close", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		px := newProxy(t, "", uri, nil)
		p := pgProvider(t, px.uri(t, uri)+"&connect_timeout=60", WithSessionTimeout(2*time.Second))
		pgHold(t, p, 1, "holder")
		silent(t, px, p.session)
		require.NoError(t, pgReceive(t, "Close returns", fieldGo(p.Close)).err)
	})
	t.Run("a call that is cancelled", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		px := newProxy(t, "", uri, nil)
		_, ch := pgHold(t, pgProvider(t, uri), 1, "holder")
		var conf LockProviderConfig
		WithSessionTimeout(2 * time.Second)(&conf)
		l, err := NewPostgresLock(pgBackground, openDB(t, uri), 1, px.uri(t, uri)+"&connect_timeout=60", "waiter", conf)
		require.NoError(t, err)
		ctx, cancel := context.WithCancel(pgBackground)
		defer cancel()
		waits := fieldGo(func() error { _, err := l.Lock(ctx); return err })
		s := l.backend.(*session)
		pgUntil(t, "it waits", func() bool {
			_, waits := s.hub.counts()
			connected, _, _ := s.trust.state()
			return waits == 1 && connected
		})
		silent(t, px, s)
		start := time.Now()
		cancel()
		require.ErrorIs(t, pgReceive(t, "Lock returns", waits).err, context.Canceled)
		require.Less(t, time.Since(start), releaseTimeout, "Lock has waited until its session was closed")
		pgQuiet(t, ch)
		pgUntil(t, "its goroutines have ended", func() bool { return s.ctx.Err() != nil })
		s.running.Wait()
	})
	t.Run("an Unlock that is cancelled", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		px := newProxy(t, "", uri, nil)
		var conf LockProviderConfig
		WithSessionTimeout(2 * time.Second)(&conf)
		l, err := NewPostgresLock(pgBackground, openDB(t, uri), 1, px.uri(t, uri)+"&connect_timeout=60", "holder", conf)
		require.NoError(t, err)
		_, err = l.Lock(pgBackground)
		require.NoError(t, err)
		s := l.backend.(*session)
		silent(t, px, s)
		ctx, cancel := context.WithCancel(pgBackground)
		cancel()
		start := time.Now()
		require.ErrorIs(t, l.Unlock(ctx), context.Canceled)
		require.Less(t, time.Since(start), releaseTimeout/2, "Unlock has waited until its session was closed")
		pgUntil(t, "its goroutines have ended", func() bool { return s.ctx.Err() != nil })
		s.running.Wait()
	})
}

// Two hosts that do not respond leave time for the third.
func TestConnectThirdHost(t *testing.T) {
	t.Parallel()
	u, err := url.Parse(newDatabase(t))
	require.NoError(t, err)
	hosts := u.Host
	for range 2 {
		silent, err := net.Listen("tcp", "127.0.0.1:0")
		require.NoError(t, err)
		t.Cleanup(func() { _ = silent.Close() })
		hosts = silent.Addr().String() + "," + hosts
	}
	password, _ := u.User.Password()
	dsn, err := staticDSN(fmt.Sprintf("postgres://%s:%s@%s%s?sslmode=disable", u.User.Username(), password, hosts, u.Path))
	require.NoError(t, err)
	link, err := openLink(t.Context(), dsn, nil, time.Minute)
	require.NoError(t, err)
	link.close()
	line, err := openLine(t.Context(), dsn, time.Minute, 0, func(string) {})
	require.NoError(t, err)
	line.close()
}

// A string that has become invalid since the provider was created is rejected for every connection,
// and no error shows it.
func TestConnectStringBecomesInvalid(t *testing.T) {
	file := filepath.Join(t.TempDir(), "services")
	write := func(line string) {
		require.NoError(t, os.WriteFile(file, []byte("[locker]\nhost=127.0.0.1\nport=1\n"+line+"\n"), 0o600))
	}
	write("")
	t.Setenv("PGSERVICEFILE", file)
	dsn, err := staticDSN("service=locker")
	require.NoError(t, err)
	for line, text := range map[string]string{
		"connect_timeout=" + secret: "value of connect_timeout", "sslmode=" + secret: "value of sslmode",
		secret + "=" + secret: "URI is invalid", secret: "URI is invalid", "hostaddr=" + secret: "value of hostaddr",
	} {
		write(line)
		l, err := openLine(t.Context(), dsn, time.Second, 0, func(string) {})
		require.Nil(t, l)
		requireRefused(t, err, text)
		require.True(t, isRefusal(err), "%v", err)
		_, err = openLink(t.Context(), dsn, nil, time.Second)
		requireRefused(t, err, text)
		require.True(t, isRefusal(err), "%v", err)
	}
}

// All parameters of a URI are used, or the URI is rejected: url.URL.Query drops those that it
// cannot parse.
func TestConnectParametersThatAreDropped(t *testing.T) {
	for _, uri := range []string{
		"postgres://user@h/db?sslmode=disable;connect_timeout=3", "postgres://user@h/db?sslmode=verify-full;", "postgres://h?a=1&;",
		"postgres://h/db?password=" + secret + ";x", "postgres://h/db?password=%" + secret, "postgres://h/db?sslmode=%zz", "postgres://h/db?%=1",
		"postgres://a:1,b:2/db?sslmode=disable;port=3", "postgres://%2Frun/db?password=" + secret + ";", "postgres://h/db?password=" + secret + "#x",
		"postgres://h/db#sslmode=disable", "postgres://user:1#" + secret + "@h/db", "postgres://a:1,b:2/db?sslmode=disable#x",
		"postgres://user:/" + secret + "@h/db", "postgres://user:1/" + secret + "@h:5432/db", "postgres://a:1,b:2/" + secret + "@h/db",
	} {
		_, err := sessionDSN(uri)
		requireRefused(t, err, "URI is invalid")
		require.ErrorContains(t, err, "; as %3B", uri)
	}
	for _, call := range constructors(t) {
		requireRefused(t, call("postgres://h/db?sslmode=disable;password="+secret), "; as %3B")
	}
	cfg := configOf(t, "postgres://a:1,b:2/d%40b?password=a%3Bb%23c%25&search_path=x%3By")
	require.Equal(t, "d@b", cfg.Database)
	require.Equal(t, "a;b#c%", cfg.Password)
	require.Equal(t, "x;y", cfg.Runtime["search_path"])
}

// WithPostgresURI: strings that are rejected, errors that are waited for, and text that no error
// shows.
func TestConnectFunction(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	option := func(f func(context.Context) (string, error)) LockProviderOption { return WithPostgresURI(f) }
	static := func(context.Context) (string, error) { return uri, nil }
	badURI := strings.Replace("postgres://user:PASSWORD@host:port/db", "PASSWORD", secret, 1)
	provider := func(t *testing.T, options ...LockProviderOption) *PostgresLockProvider {
		p, err := NewLockProvider(PostgresLockProviderKind, options...)
		require.NoError(t, err)
		t.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
		return p.(*PostgresLockProvider)
	}
	t.Run("refused when the provider is made", func(t *testing.T) {
		t.Parallel()
		for text, options := range map[string][]LockProviderOption{
			"is nil":          {option(nil)},
			"both name":       {option(static), WithPostgresBackend(uri, "")},
			"WithPostgresURI": nil,
		} {
			_, err := NewLockProvider(PostgresLockProviderKind, options...)
			requireRefused(t, err, text)
		}
		db := openDB(t, uri)
		var conf LockProviderConfig
		option(static)(&conf)
		_, err := NewPostgresLock(t.Context(), db, 1, uri, "event", conf)
		requireRefused(t, err, "WithPostgresURI")
	})
	t.Run("asked before each connection", func(t *testing.T) {
		t.Parallel()
		var calls atomic.Int32
		p := provider(t, WithPostgresBackend("", "service"), option(func(ctx context.Context) (string, error) {
			_, bounded := ctx.Deadline()
			assert.True(t, bounded)
			calls.Add(1)
			return pgNamed(t, uri, "asked"), nil
		}))
		require.Zero(t, calls.Load(), "asked though nothing is sent")
		_, ch := pgHold(t, p, 1, "holder")
		db := pgDB(t, uri)
		pid := pgOwn(t, db, p.session)
		before := calls.Load()
		pgTerminate(t, db, pid)
		pgUntil(t, "it has reconnected", func() bool { return p.Stats().Connected && pgOwn(t, db, p.session) != pid })
		require.Greater(t, calls.Load(), before)
		pgQuiet(t, ch)
		f, err := NewPostgresPreemptiveLockerFactory("", "", []LockProviderOption{option(static)})
		require.NoError(t, err)
		l := f("repo", 1, "event")
		t.Cleanup(func() { _ = l.provider.(*PostgresLockProvider).Close() })
		_, err = l.Lock(t.Context())
		require.NoError(t, err)
		require.NoError(t, l.Release(t.Context()))
	})
	t.Run("an error is waited for", func(t *testing.T) {
		t.Parallel()
		var calls atomic.Int32
		p := provider(t, option(func(context.Context) (string, error) {
			if calls.Add(1) <= 3 {
				return "", errors.New("the vault is sealed")
			}
			return uri, nil
		}))
		fieldWorks(t, p, 2)
	})
	for name, failure := range map[string]struct {
		err  error
		want string
	}{
		"text": {errors.New("the vault is sealed"), "the vault is sealed"},
		"URI":  {second(url.Parse(badURI)), "may hold a password"},
		"pair": {errors.New("cannot use host=h password=" + secret), "may hold a password"},
	} {
		t.Run("an error that stays: "+name, func(t *testing.T) {
			t.Parallel()
			var log pgLog
			p := provider(t, log.option(), WithLockTimeout(time.Second), option(func(context.Context) (string, error) { return "", failure.err }))
			_, err := pgNew(t, p, 1, "event").Lock(t.Context())
			require.ErrorIs(t, err, ErrLockTimeout)
			require.ErrorContains(t, err, failure.want)
			requireNoSecret(t, err)
			require.Contains(t, log.String(), failure.want)
			require.NotContains(t, log.String(), secret)
		})
	}
	t.Run("an invalid string is refused", func(t *testing.T) {
		t.Parallel()
		for _, bad := range []string{"", "postgres://user:" + secret + "@host:port/db", "host=h pool_max_conns=3 password=" + secret} {
			var log pgLog
			p := provider(t, log.option(), option(func(context.Context) (string, error) { return bad, nil }))
			_, err := pgNew(t, p, 1, "event").Lock(t.Context())
			requireRefused(t, err, "postgres URI")
			require.NotErrorIs(t, err, ErrLockTimeout)
			require.NotContains(t, log.String(), secret)
		}
	})
	t.Run("a function that ignores its context", func(t *testing.T) {
		t.Parallel()
		hang, ended := make(chan struct{}), make(chan struct{}, maxAsks)
		p := provider(t, WithLockTimeout(time.Second), option(func(context.Context) (string, error) {
			<-hang
			defer func() { ended <- struct{}{} }()
			return "", nil
		}))
		_, err := p.LockKey(t.Context(), "repo", 1)
		require.ErrorIs(t, err, ErrLockTimeout)
		// Close must not hang.
		require.NoError(t, p.Close())
		close(hang)
		pgReceive(t, "the function ends", ended)
	})
}

// A4: after a failed login other credentials are tried soon, even by a provider that has never
// worked. A function that returns another token for each call does not cause one attempt per
// second.
func TestConnectFreshCredentials(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	t.Run("fresh ones are tried soon", func(t *testing.T) {
		t.Parallel()
		w := &way{ask: func(context.Context) (string, error) { return "fresh", nil }, last: "stale"}
		refused := &pq.Error{Code: "28P01"}
		for range freshTries {
			require.True(t, w.rest(t.Context(), time.Minute, refused))
		}
		require.False(t, w.rest(t.Context(), 3*reopenMax/2, refused), "not for ever")
		w.connected()
		require.True(t, w.rest(t.Context(), time.Minute, refused))
		w.last = "fresh"
		require.False(t, w.rest(t.Context(), 3*reopenMax/2, refused), "the refused ones again")
		w.last = "stale"
		require.False(t, w.rest(t.Context(), 3*reopenMax/2, errors.New("connection refused")), "no failed login")
	})
	t.Run("a provider that has never worked", func(t *testing.T) {
		t.Parallel()
		relay := newFieldProxy(t, uri)
		relay.refuseLogins("28P01", "password authentication failed")
		var stale atomic.Bool
		stale.Store(true)
		p, err := NewLockProvider(PostgresLockProviderKind, WithPostgresURI(func(context.Context) (string, error) {
			if stale.Load() {
				return pgNamed(t, relay.uri(t, uri), "stale"), nil
			}
			return pgNamed(t, relay.uri(t, uri), "fresh"), nil
		}))
		require.NoError(t, err)
		plp := p.(*PostgresLockProvider)
		t.Cleanup(func() { _ = plp.Close() })
		// After four attempts the pause is about two seconds.
		for i := 0; i < 4; {
			before := relay.loginsSince(time.Time{})
			_, err := plp.LockKey(t.Context(), "repo", 1)
			require.Error(t, err)
			require.NotErrorIs(t, err, ErrLockTimeout)
			if relay.loginsSince(time.Time{}) > before {
				i++
			}
		}
		plp.session.mu.Lock()
		// The provider must not wait for this pause.
		plp.session.retryAt = time.Now().Add(time.Hour)
		plp.session.mu.Unlock()
		relay.refuseLogins("", "")
		stale.Store(false)
		pgUntil(t, "it works", func() bool { return second(plp.LockKey(t.Context(), "repo", 1)) == nil })
	})
}

// A3: the password of the role changes every two seconds, the function returns the new one a moment
// late, and connections are terminated all the time. No hold is lost and no caller gets an error.
func TestConnectPasswordRotates(t *testing.T) {
	t.Parallel()
	length := 10 * time.Second
	if d, err := time.ParseDuration(os.Getenv("LOCKER_TEST_ROTATION")); err == nil {
		length = d
	}
	server := pgCluster(t, pgserver.Options{Password: "admin"})
	uri, err := server.CreateDatabase(pgBackground, "rotation")
	require.NoError(t, err)
	admin := pgDB(t, uri)
	pgExec(t, admin, `CREATE ROLE app LOGIN PASSWORD '0'; GRANT ALL ON SCHEMA public TO app`)
	var current atomic.Int64
	var calls atomic.Int32
	credentials := WithPostgresURI(func(context.Context) (string, error) {
		calls.Add(1)
		u, err := url.Parse(uri)
		if err == nil {
			u.User = url.UserPassword("app", fmt.Sprint(current.Load()))
		}
		return u.String(), err
	})
	var providers []*PostgresLockProvider
	for range 2 {
		p, err := NewLockProvider(PostgresLockProviderKind, credentials)
		require.NoError(t, err)
		t.Cleanup(func() { _ = p.(*PostgresLockProvider).Close() })
		providers = append(providers, p.(*PostgresLockProvider))
	}
	var holds []<-chan NotificationPayload
	for i := range 10 {
		_, ch := pgHold(t, providers[i%2], int64(1000+i), "holder")
		holds = append(holds, ch)
	}
	ctx, cancel := context.WithTimeout(pgBackground, length)
	defer cancel()
	var running sync.WaitGroup
	var cycles, killed, rotations atomic.Int32
	for i, p := range providers {
		for j := range 3 {
			running.Go(func() {
				for n := 0; ctx.Err() == nil; n++ {
					l := pgLocker(t, p)("repo", uint(10*i+j), "cycle")
					if _, err := l.Lock(pgBackground); !assert.NoError(t, err) {
						return
					}
					if !assert.NoError(t, l.Release(pgBackground)) {
						return
					}
					cycles.Add(1)
				}
			})
		}
	}
	running.Go(func() {
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		for ctx.Err() == nil {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			next := current.Load() + 1
			_, err := admin.Exec(fmt.Sprintf(`ALTER ROLE app PASSWORD '%d'`, next))
			assert.NoError(t, err)
			// A sidecar needs some time, too.
			late := time.After(time.Duration(mathrand.IntN(300)) * time.Millisecond)
			<-late
			current.Store(next)
			rotations.Add(1)
		}
	})
	running.Go(func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			rows, err := admin.Query(`SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app' AND random() < 0.4`)
			if !assert.NoError(t, err) {
				return
			}
			for rows.Next() {
				killed.Add(1)
			}
			_ = rows.Close()
		}
	})
	running.Wait()
	for _, ch := range holds {
		pgQuiet(t, ch)
	}
	t.Logf("%d rotations, %d connections terminated, %d cycles, %d calls of the function", rotations.Load(), killed.Load(), cycles.Load(), calls.Load())
	require.NotZero(t, cycles.Load())
	require.GreaterOrEqual(t, killed.Load(), int32(10))
	require.NotZero(t, rotations.Load())
}

// A3: a passfile is read before each connection. If it is updated three seconds after a rotation,
// the claim waits.
func TestConnectPassfile(t *testing.T) {
	t.Parallel()
	server := pgCluster(t, pgserver.Options{Password: "admin"})
	uri, err := server.CreateDatabase(pgBackground, "passfile")
	require.NoError(t, err)
	admin := pgDB(t, uri)
	pgExec(t, admin, `CREATE ROLE app LOGIN PASSWORD 'first'; GRANT ALL ON SCHEMA public TO app`)
	file := filepath.Join(t.TempDir(), "passfile")
	write := func(password string) {
		require.NoError(t, os.WriteFile(file, []byte("127.0.0.1:*:*:app:"+password+"\n"), 0o600))
	}
	write("first")
	u, err := url.Parse(uri)
	require.NoError(t, err)
	p := pgProvider(t, fmt.Sprintf("host=127.0.0.1 port=%s user=app dbname=%s sslmode=disable passfile='%s'", u.Port(), u.Path[1:], file))
	_, ch := pgHold(t, p, 1, "holder")
	pgExec(t, admin, `ALTER ROLE app PASSWORD 'second'`)
	pgExec(t, admin, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'`)
	claim := fieldGo(func() error {
		l := pgNew(t, p, 2, "claim")
		if _, err := l.Lock(pgBackground); err != nil {
			return err
		}
		return l.Unlock(pgBackground)
	})
	<-fieldAfter(t, 3*time.Second, func() { write("second") })
	r := pgReceive(t, "the claim ends", claim)
	require.NoError(t, r.err, "after %v", r.took)
	pgQuiet(t, ch)
}

// B4: connections through a Unix socket with peer authentication, however the socket is named.
func TestConnectSocket(t *testing.T) {
	t.Parallel()
	me, err := user.Current()
	require.NoError(t, err)
	server := pgCluster(t, pgserver.Options{
		Config: map[string]string{"unix_socket_directories": "."}, // the data folder, which the server and the test can enter
		Files:  map[string]string{"pg_hba.conf": "local all all peer\nhost all all all trust\n"},
	})
	require.NoError(t, server.Exec(pgBackground, `CREATE ROLE `+pq.QuoteIdentifier(me.Username)+` SUPERUSER LOGIN`))
	for i, uri := range []string{
		fmt.Sprintf("host='%s' port=%d dbname=postgres", server.DataDir(), server.Port()),
		fmt.Sprintf("postgres:///postgres?host=%s&port=%d", url.QueryEscape(server.DataDir()), server.Port()),
		fmt.Sprintf("postgres://%s:%d/postgres", url.QueryEscape(server.DataDir()), server.Port()),
		fmt.Sprintf("postgres://%s@%s:%d/postgres?sslmode=verify-full", me.Username, url.QueryEscape(server.DataDir()), server.Port()),
	} {
		fieldWorks(t, pgProvider(t, uri), uint(i))
	}
	_, err = pgProvider(t, fmt.Sprintf("host='%s' port=%d dbname=postgres user=postgres", server.DataDir(), server.Port())).LockKey(pgBackground, "repo", 1)
	if me.Username != "postgres" {
		require.ErrorContains(t, err, "Peer authentication failed")
		require.NotErrorIs(t, err, ErrLockTimeout)
	}
}

// B1: a URL with two hosts and two ports finds the one that accepts writes.
func TestConnectTwoHosts(t *testing.T) {
	t.Parallel()
	reader := pgCluster(t, pgserver.Options{Config: map[string]string{"default_transaction_read_only": "on"}})
	writer := pgCluster(t, pgserver.Options{})
	fieldWorks(t, pgProvider(t, fmt.Sprintf("postgres://postgres@127.0.0.1:%d,127.0.0.1:%d/postgres?sslmode=disable", reader.Port(), writer.Port())), 1)
}

// authority creates certificates.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string // its own certificate
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{t: t, file: filepath.Join(t.TempDir(), "ca.crt")}
	cert, key := a.sign("locker's tests", nil)
	require.NoError(t, os.WriteFile(a.file, []byte(cert), 0o600))
	block, _ := pem.Decode([]byte(cert))
	var err error
	a.cert, err = x509.ParseCertificate(block.Bytes)
	require.NoError(t, err)
	block, _ = pem.Decode([]byte(key))
	private, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	require.NoError(t, err)
	a.key = private.(*ecdsa.PrivateKey)
	return a
}

// sign creates a certificate and its key, both in PEM. The first certificate is the authority's
// own.
func (a *authority) sign(name string, hosts []string, ips ...net.IP) (cert, key string) {
	a.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(a.t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		DNSNames: hosts, IPAddresses: ips, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	parent, signer := a.cert, a.key
	if parent == nil {
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
		parent, signer = template, private
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &private.PublicKey, signer)
	require.NoError(a.t, err)
	encoded, err := x509.MarshalPKCS8PrivateKey(private)
	require.NoError(a.t, err)
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})),
		string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: encoded}))
}

// tlsCluster starts a server that accepts only TLS, and identifies the authority's clients by their
// certificates.
func tlsCluster(t testing.TB, a *authority, method string, config map[string]string) *pgserver.Server {
	t.Helper()
	cert, key := a.sign("server", nil, net.IPv4(127, 0, 0, 1))
	ca, err := os.ReadFile(a.file)
	require.NoError(t, err)
	settings := map[string]string{"ssl": "on", "ssl_ca_file": "ca.crt"}
	for k, v := range config {
		settings[k] = v
	}
	return pgCluster(t, pgserver.Options{Config: settings, Files: map[string]string{
		"server.crt": cert, "server.key": key, "ca.crt": string(ca),
		// pgserver itself connects without TLS, to the database "postgres".
		"pg_hba.conf": "host postgres postgres all trust\nhostssl all all all " + method + "\n",
	}})
}

// tlsURI returns a URI with the parameters of TLS.
func tlsURI(t testing.TB, uri string, parameters map[string]string) string {
	t.Helper()
	u, err := url.Parse(uri)
	require.NoError(t, err)
	q := u.Query()
	q.Del("sslmode")
	for k, v := range parameters {
		q.Set(k, v)
	}
	u.RawQuery = q.Encode()
	return u.String()
}

// The settings for TLS apply. Without any, TLS is required.
func TestConnectTLS(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	other := newAuthority(t)
	server := tlsCluster(t, a, "cert", nil)
	uri, err := server.CreateDatabase(pgBackground, "tls")
	require.NoError(t, err)
	dir := t.TempDir()
	clientCert, clientKey := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	cert, key := a.sign("postgres", nil)
	require.NoError(t, os.WriteFile(clientCert, []byte(cert), 0o600))
	require.NoError(t, os.WriteFile(clientKey, []byte(key), 0o600))
	with := func(uri string, parameters ...string) string {
		all := map[string]string{"sslcert": clientCert, "sslkey": clientKey}
		for i := 0; i < len(parameters); i += 2 {
			all[parameters[i]] = parameters[i+1]
		}
		return tlsURI(t, uri, all)
	}
	refused := func(uri, text string) {
		t.Helper()
		_, err := pgProvider(t, uri).LockKey(pgBackground, "repo", 1)
		require.ErrorContains(t, err, text)
		require.NotErrorIs(t, err, ErrLockTimeout)
	}

	fieldWorks(t, pgProvider(t, with(uri)), 1)
	fieldWorks(t, pgProvider(t, with(uri, "sslmode", "verify-full", "sslrootcert", a.file)), 2)
	fieldWorks(t, pgProvider(t, with(strings.Replace(uri, "127.0.0.1", "localhost", 1), "sslmode", "verify-ca", "sslrootcert", a.file)), 3)
	refused(with(strings.Replace(uri, "127.0.0.1", "localhost", 1), "sslmode", "verify-full", "sslrootcert", a.file), "certificate")
	refused(with(uri, "sslmode", "verify-full", "sslrootcert", other.file), "certificate")
	refused(with(uri, "sslmode", "verify-ca", "sslrootcert", other.file), "certificate")
	refused(with(uri, "sslmode", "verify-full", "sslrootcert", filepath.Join(dir, "missing")), "missing")
	refused(with(uri, "sslmode", "disable"), "pg_hba.conf")
	// The server's error is "connection requires a valid client certificate".
	refused(tlsURI(t, uri, nil), "certificate")

	plain := newDatabase(t)
	refused(tlsURI(t, plain, nil), "sslmode=disable")
	fieldWorks(t, pgProvider(t, tlsURI(t, plain, map[string]string{"sslmode": "prefer"})), 1)
}

// overTLS names the cases of the contract that run over TLS. They cover every statement, every kind
// of message, and every way in which a connection begins and ends. With LOCKER_TEST_TLS=all all
// cases run, which takes two minutes.
var overTLS = []string{
	"The story", "C1 ", "C3 an older", "C4 a waiter", "C5 the holder", "C7 ", "C10 ", "C15 ", "C16 Do locks", "C20 a failed", "C21 failures",
	"C22 Close ends", "C24 a hold", "C24 a claim", "C24 C18", "C26 claims wait", "C33 a claim that comes", "C34 a shielded", "C36 ", "C30 ",
}

// TestContractTLS runs the contract over TLS, with a certificate that is verified.
func TestContractTLS(t *testing.T) {
	t.Parallel()
	a := newAuthority(t)
	server := tlsCluster(t, a, "trust", nil)
	slots := make(chan struct{}, 4)
	ran := map[string]bool{}
	for _, c := range slices.Concat(contract, troubleCases(false)) {
		i := slices.IndexFunc(overTLS, func(prefix string) bool { return strings.HasPrefix(c.name, prefix) })
		if i < 0 && os.Getenv("LOCKER_TEST_TLS") != "all" {
			continue
		}
		if i >= 0 {
			ran[overTLS[i]] = true
		}
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			slots <- struct{}{}
			defer func() { <-slots }()
			uri, err := server.CreateDatabase(pgBackground, "contract")
			require.NoError(t, err)
			newPostgresEnv(t, tlsURI(t, uri, map[string]string{"sslmode": "verify-full", "sslrootcert": a.file})).run(c.run)
		})
	}
	require.Len(t, ran, len(overTLS), "a case has another name now")
}

// B5: PgBouncer in session mode, with a pool that is large enough, and with one that is one
// connection short.
func TestConnectPgBouncer(t *testing.T) {
	t.Parallel()
	program := pgBouncerProgram(t)
	server := pgCluster(t, pgserver.Options{})
	behind := func(t *testing.T, size int, options ...LockProviderOption) (*PostgresLockProvider, string) {
		uri, err := server.CreateDatabase(pgBackground, "pgbouncer")
		require.NoError(t, err)
		address := pgBouncer(t, program, uri, "session", fmt.Sprintf("default_pool_size = %d", size))
		return pgProvider(t, throughAddress(t, uri, address), options...), uri
	}
	t.Run("B5 a pool of four", func(t *testing.T) {
		t.Parallel()
		p, uri := behind(t, 4)
		// The other provider connects directly.
		other := pgProvider(t, uri)
		holder, ch, err := fieldLock(t, p, 1, "holder")
		require.NoError(t, err)
		claim := fieldGo(func() error {
			l, _, err := fieldLock(t, other, 1, "claim")
			if err != nil {
				return err
			}
			return l.Release(pgBackground)
		})
		n := pgReceive(t, "the holder is notified", ch)
		require.Equal(t, "claim", n.Message)
		require.NoError(t, holder.Release(pgBackground))
		require.NoError(t, pgReceive(t, "the claim ends", claim).err)
		_, kept, err := fieldLock(t, p, 2, "kept")
		require.NoError(t, err)
		db := pgDB(t, uri)
		pid := pgOwn(t, db, p.session)
		pgTerminate(t, db, pid)
		pgUntil(t, "it has reconnected", func() bool { return p.Stats().Connected && pgOwn(t, db, p.session) != pid })
		pgQuiet(t, kept)
	})
	t.Run("B5 one short", func(t *testing.T) {
		t.Parallel()
		// With a short session timeout the third connection would become idle before the lock
		// timeout.
		p, _ := behind(t, 3, WithLockTimeout(10*time.Second), WithSessionTimeout(time.Minute))
		_, _, err := fieldLock(t, p, 1, "holder")
		require.ErrorIs(t, err, ErrLockTimeout)
		require.ErrorContains(t, err, "no answer to the first statement")
		require.ErrorContains(t, err, "is a pool in between used up?")
	})
	t.Run("B5 one connection", func(t *testing.T) {
		t.Parallel()
		p, _ := behind(t, 1, WithLockTimeout(15*time.Second))
		_, err := p.LockKey(pgBackground, "repo", 1)
		require.Error(t, err)
		require.ErrorContains(t, err, "is a pool in between used up?")
	})
}

// B6: the encoding of the database does not have every character. A claim never fails because of
// its event.
func TestConnectEncoding(t *testing.T) {
	t.Parallel()
	const event = "grüße – 🔒 界"
	for encoding, want := range map[string]string{
		"LATIN1": "grüße ? ? ?", "WIN1252": "grüße ? ? ?", "KOI8R": "gr??e ? ? ?", "EUC_JP": "gr??e ? ? ?", "SQL_ASCII": event, "UTF8": event,
	} {
		t.Run("B6 "+encoding, func(t *testing.T) {
			t.Parallel()
			uri := newDatabase(t)
			admin := pgDB(t, uri)
			name := "encoding_" + strings.ToLower(encoding) + "_" + fmt.Sprint(time.Now().UnixNano())
			pgExec(t, admin, `CREATE DATABASE `+name+` ENCODING '`+encoding+`' LOCALE 'C' TEMPLATE template0`)
			t.Cleanup(func() { pgExec(t, admin, `DROP DATABASE `+name+` WITH (FORCE)`) })
			u, err := url.Parse(uri)
			require.NoError(t, err)
			u.Path = "/" + name
			p, other := pgProvider(t, u.String()), pgProvider(t, u.String())
			t.Cleanup(func() { _, _ = p.Close(), other.Close() })

			holder, ch, err := fieldLock(t, p, 1, event)
			require.NoError(t, err)
			all, err := p.ListLocks(pgBackground)
			require.NoError(t, err)
			require.Equal(t, want, all[0].Event)

			claim := fieldGo(func() error { _, _, err := fieldLock(t, other, 1, event); return err })
			require.Equal(t, want, pgReceive(t, "the holder is notified", ch).Message)
			newest := fieldGo(func() error { _, _, err := fieldLock(t, p, 1, "newest"); return err })
			err = pgReceive(t, "the waiter is superseded", claim).err
			require.ErrorIs(t, err, ErrLockPreempted)
			require.NoError(t, holder.Release(pgBackground))
			require.NoError(t, pgReceive(t, "the newest claim ends", newest).err)

			l, ch := pgHold(t, p, 7, event)
			require.NoError(t, pgNew(t, other, 7, event).Notify(pgBackground))
			require.Equal(t, want, pgReceive(t, "the holder is notified", ch).Message)
			require.NoError(t, l.Unlock(pgBackground))

			_, ch, err = fieldLock(t, p, 3, "is asked to stop")
			require.NoError(t, err)
			asked, err := other.RequestStop(pgBackground, "field", 3, event)
			require.NoError(t, err)
			require.True(t, asked)
			require.Equal(t, want, pgReceive(t, "the holder is asked", ch).Message)

			_, err = p.LockKey(pgBackground, "org/🔒", 1)
			if want == event {
				require.NoError(t, err)
			} else {
				// Two repositories must not have one key.
				require.ErrorContains(t, err, "org/🔒")
				require.ErrorContains(t, err, encoding)
				require.NotErrorIs(t, err, ErrLockTimeout)
			}
		})
	}
}

// B7: a table whose index has another order than the collation has two rows for one pull request.
// The library logs it at first use, and gives such a pull request no key.
func TestConnectTwoRows(t *testing.T) {
	t.Parallel()
	t.Run("B7 new tables have an order that does not change", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		fieldWorks(t, pgProvider(t, uri), 1)
		require.Equal(t, "C", pgGet[string](t, pgDB(t, uri), `SELECT c.collname FROM pg_attribute a JOIN pg_collation c ON c.oid = a.attcollation
			WHERE a.attrelid = 'env_locks'::regclass AND a.attname = 'repo'`))
	})
	const table = `CREATE TABLE env_locks (lock_key bigint UNIQUE, repo text, pull_request integer, PRIMARY KEY (repo, pull_request));
		INSERT INTO env_locks VALUES (11, 'org/twice', 1), (12, 'org/once', 1)`
	t.Run("B7 one of them is not found", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		// The update of pg_index needs a superuser.
		if !sharedServer(t).Own() {
			var err error
			uri, err = pgCluster(t, pgserver.Options{}).CreateDatabase(pgBackground, "twice")
			require.NoError(t, err)
		}
		db := pgDB(t, uri)
		pgExec(t, db, table)
		pgExec(t, db, `UPDATE pg_index SET indisready = false WHERE indexrelid = 'env_locks_pkey'::regclass`)
		pgExec(t, db, `INSERT INTO env_locks VALUES (13, 'org/twice', 1)`)
		pgExec(t, db, `UPDATE pg_index SET indisready = true WHERE indexrelid = 'env_locks_pkey'::regclass`)
		var log pgLog
		p := pgProvider(t, uri, log.option())
		fieldWorks(t, p, 5)
		require.Contains(t, log.String(), "two rows for one pull request")
		require.Contains(t, log.String(), "org/twice")
		require.NotContains(t, log.String(), "org/once")

		// The commands of docs/operations.md.
		one := fieldOne(t, db)
		pgExec(t, one, `SET enable_indexscan = off; SET enable_indexonlyscan = off; SET enable_bitmapscan = off`)
		var repo, keys string
		var pull int
		require.NoError(t, one.QueryRowContext(pgBackground, `SELECT repo, pull_request, array_agg(lock_key ORDER BY lock_key) FROM env_locks
			GROUP BY repo COLLATE "C", repo, pull_request HAVING count(*) > 1`).Scan(&repo, &pull, &keys))
		require.Equal(t, "org/twice 1 {11,13}", fmt.Sprint(repo, " ", pull, " ", keys))
		_, err := one.ExecContext(pgBackground, `REINDEX TABLE env_locks`)
		require.ErrorContains(t, err, "could not create unique index")
		pgExec(t, one, `DELETE FROM env_locks WHERE lock_key = 11`)
		pgExec(t, one, `REINDEX TABLE env_locks`)
		key, err := p.LockKey(pgBackground, "org/twice", 1)
		require.NoError(t, err)
		require.Equal(t, int64(13), key)
		pgExec(t, one, `DROP VIEW env_lock_overview; ALTER TABLE env_locks ALTER COLUMN repo TYPE text COLLATE "C"`)
		pgExec(t, one, SchemaSQL)
		fieldWorks(t, p, 5)
	})
	t.Run("B7 both are found", func(t *testing.T) {
		t.Parallel()
		uri := newDatabase(t)
		db := pgDB(t, uri)
		pgExec(t, db, table)
		pgExec(t, db, `ALTER TABLE env_locks DROP CONSTRAINT env_locks_pkey; CREATE INDEX ON env_locks (repo, pull_request);
			INSERT INTO env_locks VALUES (13, 'org/twice', 1)`)
		p := pgProvider(t, uri)
		_, err := p.LockKey(pgBackground, "org/twice", 1)
		require.ErrorContains(t, err, "two rows")
		require.ErrorContains(t, err, "11")
		require.ErrorContains(t, err, "13")
		key, err := p.LockKey(pgBackground, "org/once", 1)
		require.NoError(t, err)
		require.Equal(t, int64(12), key)
	})
}

// dayRole creates a database, a role that may create the tables there, and the role day_role, which
// may act as the other one.
func dayRole(t *testing.T) (uri string, admin *sql.DB) {
	t.Helper()
	server := pgCluster(t, pgserver.Options{})
	uri, err := server.CreateDatabase(pgBackground, "roles")
	require.NoError(t, err)
	admin = pgDB(t, uri)
	pgExec(t, admin, `CREATE ROLE owner; GRANT ALL ON SCHEMA public TO owner; CREATE ROLE day_role LOGIN; GRANT owner TO day_role`)
	return uri, admin
}

// B9: a role that is created for a day acts as an owner that stays, and can be dropped.
func TestConnectDayRole(t *testing.T) {
	t.Parallel()
	uri, admin := dayRole(t)
	u, err := url.Parse(uri)
	require.NoError(t, err)
	p := pgProvider(t, fmt.Sprintf("host=127.0.0.1 port=%s user=day_role dbname=%s sslmode=disable options='-c role=owner'", u.Port(), u.Path[1:]))
	fieldWorks(t, p, 1)
	require.NoError(t, p.Close())
	pgExec(t, admin, `DROP OWNED BY day_role; DROP ROLE day_role`)
	fieldWorks(t, pgProvider(t, uri), 1)
	require.Equal(t, "owner", pgGet[string](t, admin, `SELECT tableowner FROM pg_tables WHERE tablename = 'env_lock_state'`))
}

// B8: tools that split schema.sql at semicolons do not recognize comments.
func TestConnectSchemaComments(t *testing.T) {
	for line := range strings.Lines(SchemaSQL) {
		_, comment, _ := strings.Cut(line, "--")
		require.NotContains(t, comment, ";")
	}
	uri := newDatabase(t)
	db := fieldOne(t, pgDB(t, uri))
	for statement := range strings.SplitSeq(SchemaSQL, ";") {
		if strings.TrimSpace(statement) != "" {
			pgExec(t, db, statement)
		}
	}
	fieldWorks(t, pgProvider(t, uri), 1)
}

func TestWithoutSecret(t *testing.T) {
	t.Parallel()
	for _, text := range []string{"parse postgres://u:secret@h/db", "parse host=h password=secret", "parse host=h password = secret", "parse Password=secret", "PGPASSWORD=secret"} {
		require.NotContains(t, withoutSecret(errors.New(text)).Error(), "secret")
	}
	require.EqualError(t, withoutSecret(errors.New("no password for https://vault")), "no password for https://vault")
}

// The function may query another database, whose errors come from the same driver.
func TestURIFunctionWithAnErrorOfTheDriver(t *testing.T) {
	t.Parallel()
	u := &uriSource{slots: make(chan struct{}, maxAsks), ask: func(context.Context) (string, error) {
		return "", &pq.Error{Code: "28P01", Message: "vault"}
	}}
	_, err := u.dsn(pgBackground)
	require.ErrorContains(t, err, "vault")
	require.False(t, isLogin(err), "this server has refused no login")
}

// A part of the schema is missing, and a schema that comes first in the search path is empty. The
// part is created next to the other tables, and not in new ones that would hide them.
func TestConnectSchemaNextToTables(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	both := pgWith(t, uri, "search_path", "first, public")
	l, _ := pgHold(t, pgProvider(t, uri), 1, "creates the tables")
	require.NoError(t, l.Unlock(pgBackground))
	pgExec(t, db, `CREATE SCHEMA first`)
	// The check of its rows may add the columns before p does.
	holder, ch := pgHold(t, pgProvider(t, both), 1, "holder")
	pgExec(t, db, `ALTER TABLE env_lock_state DROP COLUMN streak CASCADE; ALTER TABLE env_lock_state DROP COLUMN holder_stop CASCADE`)
	p := pgProvider(t, both)
	require.NoError(t, pgNew(t, p, 1, "claim").Notify(pgBackground))
	require.Equal(t, "claim", pgReceive(t, "the holder is notified", ch).Message)
	require.NoError(t, holder.Unlock(pgBackground))
	fieldWorks(t, p, 2)
	require.Zero(t, pgGet[int](t, db, `SELECT count(*) FROM pg_class WHERE relnamespace = 'first'::regnamespace`))
}

// With WithOriginalReplicas, a session reconnects although the server has not noticed the end of its
// last connection, and although its role may not end connections: the role that has logged in may.
func TestConnectDayRoleReconnects(t *testing.T) {
	t.Parallel()
	uri, admin := dayRole(t)
	uri = pgWith(t, pgAs(t, uri, "day_role"), "options", "-c role=owner")
	px := newProxy(t, "", uri, nil)
	p := pgProvider(t, px.uri(t, uri), WithOriginalReplicas(), WithSessionTimeout(time.Minute))
	kept, notified := pgHold(t, p, 1, "kept")
	old := pgSession(p).lock
	require.True(t, px.silenceBackend(pgOwn(t, admin, p.session)))
	pgUntil(t, "the session has reconnected", func() bool {
		now, connected := p.session.trust.current()
		return connected && now.lock != old
	})
	require.Empty(t, notified, "C24 the hold is kept")
	require.NoError(t, kept.Unlock(pgBackground))
}

// A column is missing, and another program has a lock of its table for as long as it likes. First use
// waits for it, with an error that says so. No server process whose client has left stays in the
// queue, where it would stop every other statement.
func TestConnectSchemaLocked(t *testing.T) {
	t.Parallel()
	uri := newDatabase(t)
	db := pgDB(t, uri)
	l, _ := pgHold(t, pgProvider(t, uri), 1, "creates the tables")
	require.NoError(t, l.Unlock(pgBackground))
	pgExec(t, db, `ALTER TABLE env_lock_state DROP COLUMN holder_stop CASCADE`)
	tx, err := db.BeginTx(pgBackground, nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(pgBackground, `LOCK TABLE env_lock_state IN ACCESS SHARE MODE`)
	require.NoError(t, err)
	p := pgProvider(t, uri, WithLockTimeout(9*time.Second))
	_, err = pgLocker(t, p)("org/repo", 1, "waits").Lock(pgBackground)
	require.ErrorIs(t, err, ErrLockTimeout)
	require.ErrorContains(t, err, "the tables are locked or large")
	require.NoError(t, p.Close())
	pgUntil(t, "no server process waits", func() bool {
		return pgGet[int](t, db, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'`) == 0
	})
	require.NoError(t, tx.Rollback())
	fieldWorks(t, pgProvider(t, uri), 1)
}
