// Dimension expressions without a builder. The classes below have the memory layout of TensorRT's own (an object that
// holds a pointer to an object with virtual functions), so that the Python bindings take them for real ones.
//
// An expression carries its value and whether the builder would know it at build time: a dynamic one answers like
// TensorRT's, unless `revealed` is set for a test that wants to see what it comes to.

#include <cstdint>
#include <deque>
#include <limits>

namespace {

bool revealed = false;

struct ExpressionCalls {
    virtual ~ExpressionCalls() = default;
    virtual bool isConstant() const = 0;
    virtual int64_t getConstantValue() const = 0;
    virtual bool isSizeTensor() const = 0;
};

struct Expression {
    explicit Expression(ExpressionCalls* to) : calls(to) {}
    virtual ~Expression() = default;
    ExpressionCalls* calls;
};

struct Value : ExpressionCalls {
    Value(int64_t v, bool c, bool s) : value(v), constant(c), size(s), face(this) {}
    bool isConstant() const override { return constant || revealed; }
    int64_t getConstantValue() const override {
        return isConstant() ? value : std::numeric_limits<int64_t>::min();
    }
    bool isSizeTensor() const override { return size; }
    int64_t value;
    bool constant;
    bool size;
    Expression face;
};

std::deque<Value> values;  // as long-lived as the process: tests are short

Expression const* keep(int64_t value, bool constant, bool size = false) {
    return &values.emplace_back(value, constant, size).face;
}

Value const& read(Expression const& expression) { return static_cast<Value const&>(*expression.calls); }

int64_t floorDiv(int64_t a, int64_t b) {
    if (b == 0) return std::numeric_limits<int64_t>::min();
    return a / b - ((a % b != 0) && ((a < 0) != (b < 0)));
}

int64_t compute(int32_t operation, int64_t a, int64_t b) {
    switch (operation) {
        case 0: return a + b;
        case 1: return a * b;
        case 2: return a > b ? a : b;
        case 3: return a < b ? a : b;
        case 4: return a - b;
        case 5: return a == b;
        case 6: return a < b;
        case 7: return floorDiv(a, b);
        case 8: return -floorDiv(-a, b);
        default: return std::numeric_limits<int64_t>::min();
    }
}

struct BuilderCalls {
    virtual ~BuilderCalls() = default;
    virtual Expression const* constant(int64_t value) { return keep(value, true); }
    virtual Expression const* operation(int32_t operation, Expression const& first, Expression const& second) {
        Value const &a = read(first), &b = read(second);
        return keep(compute(operation, a.value, b.value), a.constant && b.constant);
    }
    virtual Expression const* declareSizeTensor(int32_t, Expression const& opt, Expression const&) {
        return keep(read(opt).value, false, true);
    }
};

BuilderCalls builder;

struct DynamicCalls : BuilderCalls {
    Expression const* constant(int64_t value) override { return keep(value, false); }
};

DynamicCalls dynamicBuilder;

}  // namespace

extern "C" {
// Where an IExprBuilder's virtual calls go: one whose constants are known at build time, one whose "constants" are
// dynamic dimensions of that value.
void* builder_calls() { return &builder; }
void* dynamic_calls() { return &dynamicBuilder; }
void reveal(int on) { revealed = on != 0; }
}
