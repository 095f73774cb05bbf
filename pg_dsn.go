package locker

import (
	"cmp"
	"context"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/lib/pq"
	"github.com/pkg/errors"
)

// dsnFunc returns the connection string for the next connection, as sessionDSN makes it.
type dsnFunc func(ctx context.Context) (string, error)

// uriSource is what WithPostgresURI was given, behind a pointer like postgresTarget.
type uriSource struct {
	ask   func(context.Context) (string, error)
	slots chan struct{} // one for each call of ask
}

const (
	maxAsks    = 4 // calls of a uriSource at a time: one for each connection of a provider
	freshTries = 5 // how often other credentials are tried soon after a failed login
)

// dsnOf returns where a provider's connection strings come from.
func dsnOf(c *LockProviderConfig) (dsnFunc, error) {
	switch {
	case c.postgresURI == nil && c.postgres == nil:
		return nil, errors.New("locker: the postgres provider needs WithPostgresBackend or WithPostgresURI")
	case c.postgresURI == nil:
		return staticDSN(c.postgres.uri)
	case c.postgresURI.ask == nil:
		return nil, errors.New("locker: the function of WithPostgresURI is nil")
	case c.postgres != nil && c.postgres.uri != "":
		return nil, errors.New("locker: WithPostgresBackend and WithPostgresURI both name a server: leave the URI of WithPostgresBackend empty, then it only names the APM service")
	}
	return c.postgresURI.dsn, nil
}

func staticDSN(uri string) (dsnFunc, error) {
	dsn, err := sessionDSN(uri)
	if err != nil {
		return nil, err
	}
	return func(context.Context) (string, error) { return dsn, nil }, nil
}

// dsn asks for the connection string. It does not wait longer than ctx for a function
// that ignores it: no caller and no Close may hang on that.
func (u *uriSource) dsn(ctx context.Context) (string, error) {
	type answer struct {
		uri string
		err error
	}
	select {
	case u.slots <- struct{}{}:
	case <-ctx.Done():
		return "", errors.New("locker: earlier calls of the function of WithPostgresURI have not returned")
	}
	answered := make(chan answer, 1)
	go func() { // ends with the function
		defer func() { <-u.slots }()
		uri, err := u.ask(ctx)
		answered <- answer{uri, err}
	}()
	select {
	case a := <-answered:
		if a.err != nil {
			// Its text alone: an error of another server must not pass for one of this server.
			return "", errors.New("locker: the function of WithPostgresURI: " + withoutSecret(a.err).Error())
		}
		dsn, err := sessionDSN(a.uri)
		if err != nil {
			return "", refusedError{errors.WithMessage(err, "locker: the function of WithPostgresURI")}
		}
		return dsn, nil
	case <-ctx.Done():
		return "", errors.New("locker: the function of WithPostgresURI did not return in time")
	}
}

// withoutSecret returns an error that does not quote a connection string: url.Parse and
// others do (C31).
func withoutSecret(err error) error {
	text := err.Error()
	if quotedPassword.MatchString(text) || strings.Contains(text, "://") && strings.Contains(text, "@") {
		return errors.New("failed (why is not shown because it may hold a password)")
	}
	return err
}

// quotedPassword allows for the spaces that key=value pairs may have.
var quotedPassword = regexp.MustCompile(`(?i)password\s*=`)

// way is how one goroutine gets its connections to the server.
type way struct {
	ask   dsnFunc
	last  string // the string of the last attempt
	fresh int    // attempts with other credentials since one has succeeded
}

// dsn returns the string for an attempt to connect.
func (w *way) dsn(ctx context.Context) (string, error) {
	dsn, err := w.ask(ctx)
	if err == nil {
		w.last = dsn
	}
	return dsn, err
}

// connected notes that an attempt has succeeded.
func (w *way) connected() { w.fresh = 0 }

// rest waits for the pause after a failed attempt, or until ctx ends. After a failed
// login it ends early, and reports so, when there are other credentials than those that
// were refused. That too has a limit: some functions make another token for each call.
func (w *way) rest(ctx context.Context, pause time.Duration, failed error) (early bool) {
	end := time.NewTimer(pause)
	defer end.Stop()
	look := time.NewTicker(reopenMax)
	defer look.Stop()
	for {
		select {
		case <-end.C:
			return false
		case <-ctx.Done():
			return false
		case <-look.C:
		}
		if !isLogin(failed) || w.fresh >= freshTries {
			continue
		}
		bound, cancel := context.WithTimeout(ctx, openTimeout)
		dsn, err := w.ask(bound)
		cancel()
		if err == nil && dsn != w.last {
			w.fresh++
			return true
		}
	}
}

// sessionDSN returns the connection string that sessions use: the caller's,
// with a name for pg_stat_activity, a bound for connecting, arguments in binary, TLS
// unless the caller or the environment says something about it, and, when several hosts
// are named, the demand for the one that takes writes. Its errors
// never quote the string, which may hold a password (C31).
func sessionDSN(uri string) (string, error) {
	if strings.TrimSpace(uri) == "" {
		return "", errors.New("locker: postgres URI is empty")
	}
	uri, err := spelledOut(uri)
	if err != nil {
		return "", err
	}
	cfg, err := pq.NewConfig(uri)
	if err != nil {
		return "", invalidURI(err)
	}
	if err := checkParameters(cfg); err != nil {
		return "", err
	}
	extra := url.Values{"binary_parameters": {"yes"}} // see array
	if cfg.ApplicationName == "" && cfg.FallbackApplicationName == "" {
		extra.Set("fallback_application_name", applicationName())
	}
	if timeout := connectTimeout(cfg); timeout != cfg.ConnectTimeout {
		extra.Set("connect_timeout", wholeSeconds(timeout))
	}
	if cfg.SSLMode == "" { // of a socket it is "disable" by now
		extra.Set("sslmode", string(pq.SSLModeRequire))
	}
	if len(cfg.Multi) > 0 && (cfg.TargetSessionAttrs == "" || cfg.TargetSessionAttrs == pq.TargetSessionAttrsAny) {
		extra.Set("target_session_attrs", string(pq.TargetSessionAttrsReadWrite))
	}
	dsn := uri
	if isURL(uri) {
		u, err := url.Parse(uri)
		if err != nil {
			return "", invalidURI(err)
		}
		q, err := parameters(u)
		if err != nil {
			return "", err
		}
		for k, v := range extra {
			q[k] = v
		}
		u.RawQuery = q.Encode()
		if u.Path == "" {
			u.Path = "/" // or, without a host, String drops the slashes
		}
		dsn = u.String()
	} else {
		for k := range extra {
			dsn += " " + pair(k, extra.Get(k))
		}
	}
	if _, err := pq.NewConfig(dsn); err != nil {
		return "", invalidURI(err)
	}
	return dsn, nil
}

// connectTimeout returns how long an attempt to connect to one host may take: as long as
// cfg says, 5 s if it says nothing, but not so long that all attempts together take longer
// than openTimeout. Close has to wait for them (see openLine), and an outage of the first
// hosts must leave time for the last one.
func connectTimeout(cfg pq.Config) time.Duration {
	attempts := 1 + len(cfg.Multi)
	if cfg.SSLMode == pq.SSLModeAllow || cfg.SSLMode == pq.SSLModePrefer { // with TLS and without
		attempts *= 2
	}
	limit := max((openTimeout / time.Duration(attempts)).Truncate(time.Second), time.Second)
	if cfg.ConnectTimeout <= 0 {
		return min(5*time.Second, limit)
	}
	return min(cfg.ConnectTimeout, limit)
}

func wholeSeconds(d time.Duration) string { return strconv.Itoa(int(d / time.Second)) }

// pair writes a parameter as one of key=value pairs.
func pair(name, value string) string {
	return name + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "'"
}

// connectConfig returns what a string of sessionDSN means now: its service file and the
// environment are read.
func connectConfig(dsn string) (pq.Config, error) {
	cfg, err := pq.NewConfig(dsn)
	if err != nil { // the environment or the service file has changed
		return pq.Config{}, refusedError{invalidURI(err)}
	}
	cfg.ConnectTimeout = connectTimeout(cfg) // the service file wins over the string
	return cfg, nil
}

// withoutService returns a string that means cfg, and names no service.
func withoutService(cfg pq.Config) string {
	hosts, addresses, ports := []string{cfg.Host}, []string{cfg.Hostaddr.String()}, []string{strconv.Itoa(int(cfg.Port))}
	for _, m := range cfg.Multi {
		hosts, ports = append(hosts, m.Host), append(ports, strconv.Itoa(int(m.Port)))
		address := "" // the host is looked up
		if m.Hostaddr.IsValid() {
			address = m.Hostaddr.String()
		}
		addresses = append(addresses, address)
	}
	values := reflect.ValueOf(cfg)
	pairs := []string{pair("service", "")} // PGSERVICE does not count then
	for _, f := range reflect.VisibleFields(values.Type()) {
		name, value := f.Tag.Get("postgres"), values.FieldByIndex(f.Index)
		if drivers[name] == "" || name == "service" {
			continue
		}
		text := fmt.Sprint(value)
		switch v := value.Interface().(type) {
		case string: // also if it is empty, or that of the environment would count
		case bool:
			text = "no"
			if v {
				text = "yes"
			}
		case time.Duration:
			text = wholeSeconds(v)
		default:
			if value.IsZero() {
				continue
			}
		}
		switch name {
		case "host":
			if len(hosts) > 1 && slices.Contains(hosts, "") { // there are addresses alone
				continue
			}
			text = strings.Join(hosts, ",")
		case "hostaddr":
			text = strings.Join(addresses, ",")
		case "port":
			text = strings.Join(ports, ",")
		}
		pairs = append(pairs, pair(name, text))
	}
	for name, value := range cfg.Runtime {
		pairs = append(pairs, pair(name, value))
	}
	return strings.Join(pairs, " ")
}

func isURL(uri string) bool {
	return strings.HasPrefix(uri, "postgres://") || strings.HasPrefix(uri, "postgresql://")
}

// parameters returns those of a URL. url.URL.Query drops what it cannot read, and the
// driver uses that; what follows a # it does not look at.
func parameters(u *url.URL) (url.Values, error) {
	q, err := url.ParseQuery(u.RawQuery)
	if err != nil || u.Fragment != "" {
		return nil, errParameters
	}
	return q, nil
}

var errParameters = errors.New("locker: postgres URI is invalid: put & between its parameters, and write ; as %3B, # as %23 and % as %25 (the value is not shown because it may hold a password)")

// spelledOut returns a URL with its hosts as parameters, if it names several with ports,
// or a socket: url.Parse takes no socket, and several ports in some versions of Go only.
func spelledOut(uri string) (string, error) {
	if !isURL(uri) {
		return uri, nil
	}
	scheme, rest, _ := strings.Cut(uri, "://")
	end := strings.IndexAny(rest, "/?#")
	if end < 0 {
		end = len(rest)
	}
	user, list := "", rest[:end]
	if at := strings.LastIndexByte(list, '@'); at >= 0 {
		user, list = list[:at+1], list[at+1:]
	}
	socket := strings.Contains(strings.ToLower(list), "%2f")
	if !socket && !(strings.Contains(list, ",") && strings.Contains(list, ":")) {
		return uri, nil
	}
	var hosts, ports []string
	given := false
	for host := range strings.SplitSeq(list, ",") {
		port := "5432"
		if i := strings.LastIndexByte(host, ':'); i >= 0 && !strings.HasSuffix(host, "]") {
			host, port, given = host[:i], cmp.Or(host[i+1:], port), true
		}
		host, err := url.PathUnescape(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
		if err != nil || strings.Contains(host, ",") {
			return "", errHosts
		}
		hosts, ports = append(hosts, host), append(ports, port)
	}
	u, err := url.Parse(scheme + "://" + user + rest[end:])
	if err != nil {
		return "", invalidURI(err)
	}
	q, err := parameters(u)
	if err != nil {
		return "", err
	}
	if q.Has("host") || given && q.Has("port") {
		return "", errHosts
	}
	q.Set("host", strings.Join(hosts, ","))
	if given {
		q.Set("port", strings.Join(ports, ","))
	}
	u.RawQuery = q.Encode()
	if u.Path == "" {
		u.Path = "/"
	}
	return u.String(), nil
}

var errHosts = errors.New("locker: postgres URI is invalid: name hosts, or the folder of a socket, once, by postgres://user@/database?host=a,b&port=5432,5433 or host=a,b port=5432,5433")

// The driver's errors that name what they are about. The value may be a password that
// was put into the wrong place, so it is not shown.
var (
	wrongVariable  = regexp.MustCompile(`^pq: (?:environment variable|wrong value for) \$(\w+)`)
	wrongParameter = regexp.MustCompile(`^pq: wrong value for "([a-z_]+)"`)
	words          = regexp.MustCompile(`[a-z_]+`)
)

// invalidURI explains an error of the driver's parser without quoting the string.
func invalidURI(err error) error {
	text := err.Error()
	if m := wrongVariable.FindStringSubmatch(text); m != nil {
		return errors.Errorf("locker: environment variable %s: github.com/lib/pq does not support it or its value; unset it for this process", m[1])
	}
	if m := wrongParameter.FindStringSubmatch(text); m != nil && drivers[m[1]] != "" {
		return errors.Errorf("locker: postgres URI is invalid: github.com/lib/pq does not support the value of %s (it is not shown because it may hold a password)", m[1])
	}
	if strings.HasPrefix(text, "pq: ") { // what does not fit together, or is in a service file
		var variables []string
		for _, word := range words.FindAllString(text, -1) {
			if variable := drivers[word]; variable != "" && os.Getenv(variable) != "" && !slices.Contains(variables, variable) {
				variables = append(variables, variable)
			}
		}
		if variables != nil {
			return errors.Errorf("locker: environment variable %s: github.com/lib/pq does not support its value, alone or together with what the URI says", strings.Join(variables, " and "))
		}
		if strings.Contains(text, "service") {
			return errors.New("locker: postgres URI is invalid: the service that it or PGSERVICE names is not in the service file (PGSERVICEFILE, otherwise ~/.pg_service.conf), or has a line that github.com/lib/pq does not support")
		}
	}
	return errors.New("locker: postgres URI is invalid: want postgres://user:password@host:port/database?sslmode=… or key=value pairs (the value is not shown because it may hold a password)")
}

// drivers are the parameters that the driver knows, and their environment variables.
var drivers = func() map[string]string {
	all := map[string]string{}
	for _, f := range reflect.VisibleFields(reflect.TypeFor[pq.Config]()) {
		if name := f.Tag.Get("postgres"); name != "" && name != "-" {
			all[name] = f.Tag.Get("env")
		}
	}
	return all
}()

// checkParameters rejects the parameters that are known to be neither the driver's nor
// the server's. The driver sends those that it does not know to the server, as settings
// of the session. What the server does not know either, it rejects at first use.
func checkParameters(cfg pq.Config) error {
	for name := range cfg.Runtime {
		switch lower := strings.ToLower(name); {
		case slices.Contains(foreignParameters, lower), migrateParameter.MatchString(lower):
			return errors.Errorf("locker: postgres URI has the parameter %s, which is for another driver or program: neither github.com/lib/pq nor PostgreSQL knows it; remove it", name)
		case !settingName.MatchString(name): // a URL with another scheme passes for a pair; the server would quote its name
			return invalidURI(errors.New("no setting's name"))
		}
	}
	return nil
}

var (
	settingName      = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$.]*$`)
	migrateParameter = regexp.MustCompile(`^x-[a-z-]+$`)
)

// foreignParameters are what URIs for other drivers often have, in lower case.
var foreignParameters = []string{
	// libpq
	"channel_binding", "gssdelegation", "gssencmode", "gsslib", "keepalives", "keepalives_count", "keepalives_idle",
	"keepalives_interval", "replication", "require_auth", "requirepeer", "requiressl", "scram_client_key", "scram_server_key",
	"servicefile", "sslcertmode", "sslcompression", "sslcrl", "sslcrldir", "sslkeylogfile", "sslpassword",
	// pgx
	"default_query_exec_mode", "description_cache_capacity", "min_read_buffer_size", "pool_health_check_period",
	"pool_max_conn_idle_time", "pool_max_conn_lifetime", "pool_max_conn_lifetime_jitter", "pool_max_conns", "pool_min_conns",
	"pool_min_idle_conns", "prefer_simple_protocol", "statement_cache_capacity", "statement_cache_mode",
	// Prisma
	"connection_limit", "pgbouncer", "pool_timeout", "schema", "socket_timeout", "sslaccept", "sslidentity", "statement_cache_size",
	// JDBC
	"currentschema", "connecttimeout", "logintimeout", "preparethreshold", "rewritebatchedinserts", "sockettimeout", "ssl",
	"sslfactory", "stringtype", "targetservertype", "tcpkeepalive",
	// Node.js
	"connectiontimeoutmillis", "idletimeoutmillis", "max", "min", "uselibpqcompat",
	// Python, Ruby, Rust, .NET
	"adapter", "checkout_timeout", "command_timeout", "conn_health_checks", "conn_max_age", "encoding", "max_overflow", "pool",
	"pool_mode", "pool_pre_ping", "pool_recycle", "pool_size", "pooling", "prepared_statement_cache_size", "prepared_statements",
	"reaping_frequency", "statement-cache-capacity", "timeout",
}
